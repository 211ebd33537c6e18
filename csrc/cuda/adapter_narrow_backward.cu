// Launchers of the fused adapter backward's projections for narrow ranks.
#include "adapter_launch.h"

namespace lka::cuda {
namespace {

template <class Form>
__global__ void __launch_bounds__(32 * Form::kWarps, Form::kResidentWarps / Form::kWarps)
    adapter_narrow_backward_kernel(const __grid_constant__ AdapterParams p) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 800
  typename Form::Block(p, shared).run();
#else  // a newer device made this from PTX for an older one
  __trap();
#endif
}

// Calls f with the type that stores elements.
template <class F>
void in_16_bits(Storage storage, F f) {
  if (storage == Storage::bfloat16)
    f(BFloat16());
  else
    f(Float16());
}

}  // namespace

void adapter_narrow_up_backward(Storage storage, const AdapterParams& p, const LaunchShape& shape,
                                cudaStream_t stream) {
  in_16_bits(storage, [&](auto s) {
    detail::with_narrow_up_block<decltype(s)>(p, [&](auto form) {
      launch("adapter_narrow_up_backward", adapter_narrow_backward_kernel<decltype(form)>, shape,
             stream, p);
    });
  });
}

void adapter_narrow_down_backward(Storage storage, const AdapterParams& p, const LaunchShape& shape,
                                  cudaStream_t stream) {
  in_16_bits(storage, [&](auto s) {
    detail::with_narrow_down_block<decltype(s)>(p, [&](auto form) {
      launch("adapter_narrow_down_backward", adapter_narrow_backward_kernel<decltype(form)>, shape,
             stream, p);
    });
  });
}

}  // namespace lka::cuda
