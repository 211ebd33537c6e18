// Body of every kernels_<isa>.cpp. The including file sets the compiler's target first and defines
// LKA_VECTOR_BYTES, LKA_TABLE and the intrinsics at hand (LKA_F16C, LKA_AVX512, LKA_AVX512_BF16):
// GCC evaluates every #if before it acts on a pragma, so that __AVX512F__ and the like are not
// defined. LKA_BFLOAT16_ONLY leaves out the other storage types. No standard-library templates may
// be used below: the linker keeps one copy of each, and it could be the one for the widest
// instruction set.
#include "depthwise_conv2d_kernel.h"
#include "fft_conv2d_kernel.h"
#include "flat_weight_gradient.h"
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

template <class T, int V>
constexpr lka::cpu::DepthwiseKernels fft_kernels() {
  return {V, &pack_fft_bias<T, V>, &convolve_fft<T, V>, &weight_gradient_fft<T, V>,
          &both_gradients_fft<T, V>};
}

template <class T, int V, int kWide>
constexpr lka::cpu::AdapterKernels adapter_kernels() {
  return {V,
          kWide,
          kRankGroup,
          &adapter_scratch<T>,
          &adapter_step_scratch<T>,
          &adapter_down_of<T, kWide>,
          &adapter_convolve_of<T, V, kWide>,
          &adapter_up_of<T, kWide>,
          &adapter_backward_of<T, V, kWide>,
          &adapter_activate<T, kWide>,
          &adapter_backward_up_of<T, V, kWide>,
          &adapter_backward_down_of<T, V, kWide>};
}

#if defined(LKA_AVX512_BF16)
template <int V>
constexpr lka::cpu::DepthwiseKernels paired_kernels() {
  return {V, &pack_paired_weights<V>, &convolve_paired<V>, nullptr};
}
constexpr lka::cpu::DepthwiseKernels flat_kernels() {
  return {kFlatLanes, nullptr, nullptr, &flat_weight_gradient};
}
#else
template <int V>
constexpr lka::cpu::DepthwiseKernels paired_kernels() {
  return {};
}
constexpr lka::cpu::DepthwiseKernels flat_kernels() { return {}; }
#endif

template <class T>
constexpr lka::cpu::KernelSet kernel_set() {
  constexpr int kFull = LKA_VECTOR_BYTES / sizeof(T);
  // Half of so few lanes, or of float64's, would not be worth the time to compile it.
  constexpr bool kOneWidth = LKA_VECTOR_BYTES == 16 || sizeof(T) == sizeof(double);
  constexpr int kHalf = kOneWidth ? kFull : kFull / 2;
  return {depthwise_kernels<T, kFull>(),
          depthwise_kernels<T, kHalf>(),
          planar_kernels<T, kFull>(),
          planar_kernels<T, kHalf>(),
          fft_kernels<T, kFull>(),
          fft_kernels<T, kHalf>(),
          adapter_kernels<T, kFull, kFull>(),
          adapter_kernels<T, kHalf, kFull>(),
          paired_kernels<kFull>(),
          paired_kernels<kHalf>(),
          flat_kernels()};
}

}  // namespace

namespace lka::cpu {

#if defined(LKA_BFLOAT16_ONLY)
const KernelSet& LKA_TABLE() {
  static constexpr KernelSet kernels = kernel_set<float>();
  return kernels;
}
#else
const KernelTable& LKA_TABLE() {
  static constexpr KernelTable table = {kernel_set<float>(), kernel_set<double>()};
  return table;
}
#endif

}  // namespace lka::cpu
