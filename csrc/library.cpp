// Registration only: implementations for the schemas that lka_kernels/ops.py defines, and the
// Python module that loading needs.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#include <exception>
#include <string>

#include "cpu/depthwise_kernel_name.h"
#include "cpu/kernel_table.h"
#include "cpu/operators.h"
#ifdef LKA_WITH_CUDA
#include "cuda/device_code.h"
#include "cuda/operators.h"
#endif

namespace {

using lka::Form;

// The operators of depthwise convolution for one backend of ops.py.
template <Form kForm>
void implement_depthwise(torch::stable::detail::StableLibrary& m, const std::string& backend) {
  m.impl(("depthwise_conv2d_forward_" + backend).c_str(),
         TORCH_BOX(&lka::cpu::depthwise_conv2d_forward<kForm>));
  m.impl(("depthwise_conv2d_backward_input_" + backend).c_str(),
         TORCH_BOX(&lka::cpu::depthwise_conv2d_backward_input<kForm>));
  m.impl(("depthwise_conv2d_backward_weight_" + backend).c_str(),
         TORCH_BOX(&lka::cpu::depthwise_conv2d_backward_weight<kForm>));
  m.impl(("depthwise_conv2d_backward_" + backend).c_str(),
         TORCH_BOX(&lka::cpu::depthwise_conv2d_backward<kForm>));
}

#ifdef LKA_WITH_CUDA
template <Form kForm>
void implement_depthwise_cuda(torch::stable::detail::StableLibrary& m, const std::string& backend) {
  m.impl(("depthwise_conv2d_forward_" + backend).c_str(),
         TORCH_BOX(&lka::cuda::depthwise_conv2d_forward<kForm>));
  m.impl(("depthwise_conv2d_backward_input_" + backend).c_str(),
         TORCH_BOX(&lka::cuda::depthwise_conv2d_backward_input<kForm>));
  m.impl(("depthwise_conv2d_backward_weight_" + backend).c_str(),
         TORCH_BOX(&lka::cuda::depthwise_conv2d_backward_weight<kForm>));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lka_kernels, CPU, m) {
  implement_depthwise<Form::any>(m, "cpu");
  implement_depthwise<Form::direct>(m, "cpu_direct");
  implement_depthwise<Form::fft>(m, "cpu_fft");
  m.impl("large_kernel_adapter_forward_cpu", TORCH_BOX(&lka::cpu::large_kernel_adapter_forward));
  m.impl("large_kernel_adapter_backward_cpu", TORCH_BOX(&lka::cpu::large_kernel_adapter_backward));
}

#ifdef LKA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(lka_kernels, CUDA, m) {
  implement_depthwise_cuda<Form::any>(m, "cuda");
  implement_depthwise_cuda<Form::direct>(m, "cuda_direct");
  implement_depthwise_cuda<Form::implicit_gemm>(m, "cuda_gemm");
  implement_depthwise_cuda<Form::fft>(m, "cuda_fft");
  m.impl("large_kernel_adapter_forward_cuda", TORCH_BOX(&lka::cuda::large_kernel_adapter_forward));
  m.impl("large_kernel_adapter_backward_cuda",
         TORCH_BOX(&lka::cuda::large_kernel_adapter_backward));
}
#endif

namespace {

PyObject* instruction_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(lka::cpu::instruction_set());
}

PyObject* built_with_cuda(PyObject*, PyObject*) {
#ifdef LKA_WITH_CUDA
  return PyBool_FromLong(1);
#else
  return PyBool_FromLong(0);
#endif
}

PyObject* finds_cuda_stream(PyObject*, PyObject*) {
#ifdef LKA_WITH_CUDA
  return PyBool_FromLong(lka::cuda::finds_current_stream());
#else
  return PyBool_FromLong(0);
#endif
}

// why_cuda_device_cannot(device, tensor_cores): a text, empty if it can.
PyObject* why_cuda_device_cannot(PyObject*, PyObject* arguments) {
  int device, tensor_cores;
  if (!PyArg_ParseTuple(arguments, "ip", &device, &tensor_cores)) return nullptr;
  std::string why = "the library was built without CUDA kernels";
#ifdef LKA_WITH_CUDA
  try {
    why = lka::cuda::why_device_cannot(device, tensor_cores != 0);
  } catch (const std::exception& error) {
    why = error.what();
  }
#endif
  return PyUnicode_FromString(why.c_str());
}

// The storage type of that name; false if it is none of ours.
bool storage_named(const std::string& name, lka::Storage& storage) {
  if (name == "float32")
    storage = lka::Storage::float32;
  else if (name == "float64")
    storage = lka::Storage::float64;
  else if (name == "bfloat16")
    storage = lka::Storage::bfloat16;
  else if (name == "float16")
    storage = lka::Storage::float16;
  else
    return false;
  return true;
}

bool direction_named(const std::string& name, lka::cpu::Direction& direction) {
  if (name == "forward")
    direction = lka::cpu::Direction::forward;
  else if (name == "backward_input")
    direction = lka::cpu::Direction::backward_input;
  else if (name == "backward_weight")
    direction = lka::cpu::Direction::backward_weight;
  else
    return false;
  return true;
}

// depthwise_kernel_name(direction, dtype, (B, C, H, W), (kH, kW), stride, padding, dilation,
// channels_last, num_threads); padding is (top, left, bottom, right).
PyObject* depthwise_kernel_name(PyObject*, PyObject* arguments) {
  const char *direction, *dtype;
  long long batch, channels, height, width, kernel_h, kernel_w, stride_h, stride_w;
  long long top, left, bottom, right, dilation_h, dilation_w;
  int channels_last, num_threads;
  if (!PyArg_ParseTuple(arguments, "ss(LLLL)(LL)(LL)(LLLL)(LL)pi", &direction, &dtype, &batch,
                        &channels, &height, &width, &kernel_h, &kernel_w, &stride_h, &stride_w,
                        &top, &left, &bottom, &right, &dilation_h, &dilation_w, &channels_last,
                        &num_threads))
    return nullptr;
  lka::cpu::Direction which;
  if (!direction_named(direction, which))
    return PyErr_Format(PyExc_ValueError,
                        "direction must be forward, backward_input or backward_weight; got %s",
                        direction);
  lka::ConvParams call;
  if (!storage_named(dtype, call.storage))
    return PyErr_Format(PyExc_ValueError,
                        "dtype must be float32, float64, bfloat16 or float16; got %s", dtype);
  for (const long long size : {kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w})
    if (size < 1)
      return PyErr_Format(PyExc_ValueError,
                          "kernel, stride and dilation must be at least 1; got %lld", size);
  call.batch = batch;
  call.channels = channels;
  call.input.height = height;
  call.input.width = width;
  call.kernel_h = kernel_h;
  call.kernel_w = kernel_w;
  call.stride_h = stride_h;
  call.stride_w = stride_w;
  call.dilation_h = dilation_h;
  call.dilation_w = dilation_w;
  call.pad_top = top;
  call.pad_left = left;
  const char* name =
      lka::cpu::depthwise_kernel_name(which, call, bottom, right, channels_last != 0, num_threads);
  if (name == nullptr) Py_RETURN_NONE;
  return PyUnicode_FromString(name);
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS,
     "The instruction set the CPU kernels run with."},
    {"built_with_cuda", built_with_cuda, METH_NOARGS, "Whether CUDA kernels were compiled in."},
    {"finds_cuda_stream", finds_cuda_stream, METH_NOARGS,
     "Whether torch has the function by which CUDA launches find their stream."},
    {"why_cuda_device_cannot", why_cuda_device_cannot, METH_VARARGS,
     "Why a CUDA device cannot run the kernels: see csrc/cuda/device_code.h."},
    {"depthwise_kernel_name", depthwise_kernel_name, METH_VARARGS,
     "The CPU kernel that sizes choose: see csrc/cpu/depthwise_kernel_name.h."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Compiled kernels of lka_kernels.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
