// Registration only: implementations for the schemas that lka_kernels/ops.py defines, and the
// Python module that loading needs.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#include <string>

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

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS,
     "The instruction set the CPU kernels run with."},
    {"built_with_cuda", built_with_cuda, METH_NOARGS, "Whether CUDA kernels were compiled in."},
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
