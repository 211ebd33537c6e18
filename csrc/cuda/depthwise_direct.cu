// Launchers of the direct depthwise convolution: one thread per element of the result, one block
// per weight for the weight gradient (a fixed tree, so the same bits every run).
#include <algorithm>

#include "depthwise_launchers.h"
#include "device/direct.cuh"
#include "launch.h"

namespace lka::cuda {
namespace {

constexpr int kThreads = 256;

template <class S, class A, bool kForward>
__global__ void map_kernel(ConvParams p, const S* weight, const S* bias, int64_t numel) {
  const MapView& target = kForward ? p.output : p.input;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < numel;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t x = i % target.width, y = i / target.width % target.height;
    const int64_t plane = i / target.width / target.height;
    const int64_t c = plane % p.channels, b = plane / p.channels;
    A value = kForward ? direct_forward<S, A>(p, weight, b, c, y, x)
                       : direct_backward_input<S, A>(p, weight, b, c, y, x);
    if (bias != nullptr) value += A(bias[c]);
    static_cast<S*>(target.data)[b * target.stride_b + c * target.stride_c + y * target.stride_h +
                                 x * target.stride_w] = S(value);
  }
}

template <class S, class A>
__global__ void weight_kernel(ConvParams p, S* grad_weight, S* grad_bias) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  const int64_t c = blockIdx.x / (taps + 1), tap = blockIdx.x % (taps + 1);
  const int64_t positions = p.output.height * p.output.width;
  A sum = 0;
  for (int64_t i = threadIdx.x; i < p.batch * positions; i += kThreads) {
    const int64_t at = i % positions;
    sum += direct_weight_term<S, A>(p, i / positions, c, at / p.output.width, at % p.output.width,
                                    tap);
  }
  __shared__ A partial[kThreads];
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  if (tap < taps)
    grad_weight[c * taps + tap] = S(partial[0]);
  else
    grad_bias[c] = S(partial[0]);
}

template <bool kForward>
void launch_map(const char* name, const ConvParams& p, const void* weight, const void* bias,
                cudaStream_t stream) {
  const MapView& target = kForward ? p.output : p.input;
  const int64_t numel = p.batch * p.channels * target.height * target.width;
  const int64_t blocks = std::min<int64_t>((numel + kThreads - 1) / kThreads, 1 << 20);
  dispatch_storage(p.storage, [&](auto s, auto a) {
    using S = decltype(s);
    launch(name, map_kernel<S, decltype(a), kForward>, {blocks, kThreads, 0}, stream, p,
           static_cast<const S*>(weight), static_cast<const S*>(bias), numel);
  });
}

}  // namespace

void direct_forward(const ConvParams& p, const void* weight, const void* bias,
                    cudaStream_t stream) {
  launch_map<true>("depthwise direct forward", p, weight, bias, stream);
}

void direct_backward_input(const ConvParams& p, const void* weight, cudaStream_t stream) {
  launch_map<false>("depthwise direct backward-input", p, weight, nullptr, stream);
}

void direct_backward_weight(const ConvParams& p, void* grad_weight, void* grad_bias,
                            cudaStream_t stream) {
  const int64_t blocks = p.channels * (p.kernel_h * p.kernel_w + 1);
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "channels × taps must be below 2^31");
  if (blocks == 0) return;
  dispatch_storage(p.storage, [&](auto s, auto a) {
    using S = decltype(s);
    launch("depthwise direct backward-weight", weight_kernel<S, decltype(a)>, {blocks, kThreads, 0},
           stream, p, static_cast<S*>(grad_weight), static_cast<S*>(grad_bias));
  });
}

}  // namespace lka::cuda
