// Body of every kernels_<isa>.cpp. The including file sets the compiler's target first and defines
// LKA_VECTOR_BYTES, LKA_TABLE, LKA_ISA_NAME and the intrinsics at hand (LKA_F16C, LKA_AVX512): GCC
// evaluates every #if before it acts on a pragma, so that __AVX512F__ and the like are not defined.
// No standard-library templates may be used below: the linker keeps one copy of each, and it could
// be the one for the widest instruction set.
#include "depthwise_conv2d_kernel.h"
#include "kernel_table.h"
#include "large_kernel_adapter_kernel.h"
#include "planar_conv2d_kernel.h"

namespace {

template <class T, int V>
constexpr lka::cpu::DepthwiseKernels depthwise_kernels() {
  return {V, &pack_weights<T, V>, &convolve<T, V>, &weight_gradient<T, V>};
}

template <class T, int V>
constexpr lka::cpu::DepthwiseKernels planar_kernels() {
  return {V, &pack_planar_weights<T, V>, &planar_convolve<T, V>, &planar_weight_gradient<T, V>};
}

template <class T, int V, int kWide>
constexpr lka::cpu::AdapterKernels adapter_kernels() {
  return {V,
          kWide,
          &adapter_scratch<T>,
          &adapter_down_of<T, V>,
          &adapter_convolve_of<T, V>,
          &adapter_up_of<T, V, kWide>,
          &adapter_backward_of<T, V, kWide>};
}

constexpr int kFloatLanes = LKA_VECTOR_BYTES / 4;
constexpr int kDoubleLanes = LKA_VECTOR_BYTES / 8;

}  // namespace

namespace lka::cpu {

const KernelTable& LKA_TABLE() {
  static constexpr KernelTable table = {
      LKA_ISA_NAME,
      depthwise_kernels<float, kFloatLanes>(),
      depthwise_kernels<float, kFloatLanes / 2>(),
      depthwise_kernels<double, kDoubleLanes>(),
      depthwise_kernels<double, kDoubleLanes / 2>(),
      planar_kernels<float, kFloatLanes>(),
      planar_kernels<float, kFloatLanes / 2>(),
      planar_kernels<double, kDoubleLanes>(),
      planar_kernels<double, kDoubleLanes / 2>(),
      adapter_kernels<float, kFloatLanes, kFloatLanes>(),
      adapter_kernels<float, kFloatLanes / 2, kFloatLanes>(),
      adapter_kernels<double, kDoubleLanes, kDoubleLanes>(),
      adapter_kernels<double, kDoubleLanes / 2, kDoubleLanes>(),
  };
  return table;
}

}  // namespace lka::cpu
