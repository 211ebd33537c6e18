// Launchers of the direct depthwise convolution on CUDA: one thread per element of the result, one
// block per weight for the weight gradient (a fixed tree, so the same bits every run).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <string>

#include "device/direct.cuh"
#include "operators.h"

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

// Looked up when first needed, so that the library also loads beside a torch without CUDA.
cudaStream_t current_stream(const Tensor& t) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get =
      reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA stream to launch on");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaGetDevice(&previous_);
    if (previous_ != device) cudaSetDevice(device);
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }

 private:
  int previous_ = 0;
};

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "launch of ", kernel,
                  " failed: ", cudaGetErrorString(error));
}

// Calls f with a value of the storage type and one of the accumulation type.
template <class F>
void dispatch_storage(Storage storage, F f) {
  switch (storage) {
    case Storage::float32: return f(float(), float());
    case Storage::float64: return f(double(), double());
    case Storage::bfloat16: return f(__nv_bfloat16(), float());
    case Storage::float16: return f(__half(), float());
  }
}

ConvParams geometry(const Tensor& map, const std::vector<int64_t>& kernel,
                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                    const std::vector<int64_t>& dilation) {
  ConvParams p;
  p.storage = storage_of(map, "input");
  p.batch = map.size(0);
  p.channels = map.size(1);
  p.kernel_h = kernel[0];
  p.kernel_w = kernel[1];
  p.stride_h = stride[0];
  p.stride_w = stride[1];
  p.dilation_h = dilation[0];
  p.dilation_w = dilation[1];
  p.pad_top = padding[0];
  p.pad_left = padding[1];
  return p;
}

template <bool kForward>
void launch_map(const ConvParams& p, const Tensor& weight, const std::optional<Tensor>& bias,
                int64_t numel) {
  const Tensor dense = torch::stable::contiguous(weight);
  Tensor dense_bias;
  if (bias.has_value()) dense_bias = torch::stable::contiguous(*bias);
  const DeviceGuard guard(weight.get_device_index());
  const cudaStream_t stream = current_stream(weight);
  const int64_t blocks = std::min<int64_t>((numel + kThreads - 1) / kThreads, 1 << 20);
  dispatch_storage(p.storage, [&](auto s, auto a) {
    using S = decltype(s);
    map_kernel<S, decltype(a), kForward><<<unsigned(blocks), kThreads, 0, stream>>>(
        p, static_cast<const S*>(dense.data_ptr()),
        bias.has_value() ? static_cast<const S*>(dense_bias.data_ptr()) : nullptr, numel);
  });
  check_launch(kForward ? "depthwise_conv2d_forward" : "depthwise_conv2d_backward_input");
}

}  // namespace

Tensor depthwise_conv2d_forward(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, bool channels_last) {
  ConvParams p = geometry(input, {weight.size(2), weight.size(3)}, stride, padding, dilation);
  const int64_t height =
      (input.size(2) + padding[0] + padding[2] - dilation[0] * (p.kernel_h - 1) - 1) / stride[0] +
      1;
  const int64_t width =
      (input.size(3) + padding[1] + padding[3] - dilation[1] * (p.kernel_w - 1) - 1) / stride[1] +
      1;
  Tensor output = empty_map(input, p.batch, p.channels, height, width, channels_last);
  if (output.numel() == 0) return output;
  p.input = view_of(input);
  p.output = view_of(output);
  launch_map<true>(p, weight, bias, output.numel());
  return output;
}

Tensor depthwise_conv2d_backward_input(const Tensor& grad_output, const Tensor& weight,
                                       const std::vector<int64_t>& input_size,
                                       const std::vector<int64_t>& stride,
                                       const std::vector<int64_t>& padding,
                                       const std::vector<int64_t>& dilation, bool channels_last) {
  ConvParams p = geometry(grad_output, {weight.size(2), weight.size(3)}, stride, padding, dilation);
  Tensor grad_input =
      empty_map(grad_output, p.batch, p.channels, input_size[0], input_size[1], channels_last);
  if (grad_input.numel() == 0) return grad_input;
  p.output = view_of(grad_output);
  p.input = view_of(grad_input);
  launch_map<false>(p, weight, std::nullopt, grad_input.numel());
  return grad_input;
}

std::tuple<Tensor, Tensor> depthwise_conv2d_backward_weight(const Tensor& grad_output,
                                                            const Tensor& input,
                                                            const std::vector<int64_t>& kernel_size,
                                                            const std::vector<int64_t>& stride,
                                                            const std::vector<int64_t>& padding,
                                                            const std::vector<int64_t>& dilation) {
  ConvParams p = geometry(input, kernel_size, stride, padding, dilation);
  Tensor grad_weight = empty(input, {p.channels, 1, p.kernel_h, p.kernel_w}, input.scalar_type());
  Tensor grad_bias = empty(input, {p.channels}, input.scalar_type());
  p.input = view_of(input);
  p.output = view_of(grad_output);
  const DeviceGuard guard(input.get_device_index());
  const cudaStream_t stream = current_stream(input);
  const int64_t blocks = p.channels * (p.kernel_h * p.kernel_w + 1);
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "channels × taps must be below 2^31");
  dispatch_storage(p.storage, [&](auto s, auto a) {
    using S = decltype(s);
    weight_kernel<S, decltype(a)><<<unsigned(blocks), kThreads, 0, stream>>>(
        p, static_cast<S*>(grad_weight.data_ptr()), static_cast<S*>(grad_bias.data_ptr()));
  });
  check_launch("depthwise_conv2d_backward_weight");
  return {grad_weight, grad_bias};
}

}  // namespace lka::cuda
