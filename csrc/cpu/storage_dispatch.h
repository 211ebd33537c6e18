// The one place where the run-time dtype of a tensor becomes a compile-time one.
#pragma once

#include "../conv_params.h"
#include "simd.h"

namespace {

// call(S{}) with S the element type of `storage`. Kernels whose arithmetic is in double serve
// float64 alone, the others everything narrower.
template <class T, class Call>
void with_storage(lka::Storage storage, const Call& call) {
#if defined(LKA_BFLOAT16_ONLY)
  call(bfloat16_t{});
#else
  if constexpr (sizeof(T) == 8) {
    call(double{});
  } else {
    switch (storage) {
      case lka::Storage::bfloat16: return call(bfloat16_t{});
      case lka::Storage::float16: return call(float16_t{});
      default: return call(float{});
    }
  }
#endif
}

}  // namespace
