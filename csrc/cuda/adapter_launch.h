// One kernel of the adapter for each of three storage types. Included by .cu files only.
#pragma once

#include "adapter_launchers.h"
#include "launch.h"

namespace lka::cuda {

// Defines the launcher NAME of NAME_kernel<Storage>(PARAMS).
#define LKA_ADAPTER_LAUNCHER(NAME, PARAMS)                                                     \
  void NAME(Storage storage, const PARAMS& p, const LaunchShape& shape, cudaStream_t stream) { \
    if (storage == Storage::float32)                                                           \
      launch(#NAME "<float32>", NAME##_kernel<Float32>, shape, stream, p);                     \
    else if (storage == Storage::bfloat16)                                                     \
      launch(#NAME "<bfloat16>", NAME##_kernel<BFloat16>, shape, stream, p);                   \
    else                                                                                       \
      launch(#NAME "<float16>", NAME##_kernel<Float16>, shape, stream, p);                     \
  }

}  // namespace lka::cuda
