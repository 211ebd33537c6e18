// Registration only: implementations for the schemas that lka_kernels/ops.py defines, and the
// Python module that loading needs.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#include <string>

#include "cpu/depthwise_kernel_name.h"
#include "cpu/kernel_table.h"
#include "cpu/operators.h"
#ifdef LKA_WITH_CUDA
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

// depthwise_kernel_name(direction, dtype, (B, C, H, W), (kH, kW), stride, padding, dilation,
// channels_last, num_threads); padding is (top, left, bottom, right).
PyObject* depthwise_kernel_name(PyObject*, PyObject* arguments) {
  const char *direction, *dtype;
  long long n[14];
  int channels_last, num_threads;
  if (!PyArg_ParseTuple(arguments, "ss(LLLL)(LL)(LL)(LLLL)(LL)pi", &direction, &dtype, &n[0], &n[1],
                        &n[2], &n[3], &n[4], &n[5], &n[6], &n[7], &n[8], &n[9], &n[10], &n[11],
                        &n[12], &n[13], &channels_last, &num_threads))
    return nullptr;
  const lka::cpu::DepthwiseSizes sizes = {n[0],  n[1],  n[2],  n[3],  n[4],
                                          n[5],  n[6],  n[7],  n[8],  n[9],
                                          n[10], n[11], n[12], n[13], channels_last != 0};
  lka::Storage storage = lka::Storage::float32;
  if (std::string(dtype) == "float64") storage = lka::Storage::float64;
  if (std::string(dtype) == "bfloat16") storage = lka::Storage::bfloat16;
  if (std::string(dtype) == "float16") storage = lka::Storage::float16;
  const char* name = lka::cpu::depthwise_kernel_name(direction, storage, sizes, num_threads);
  if (name == nullptr) Py_RETURN_NONE;
  return PyUnicode_FromString(name);
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS,
     "The instruction set the CPU kernels run with."},
    {"built_with_cuda", built_with_cuda, METH_NOARGS, "Whether CUDA kernels were compiled in."},
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
