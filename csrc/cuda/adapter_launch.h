// One kernel of the adapter for each of three storage types. Included by .cu files only.
#pragma once

#include "adapter_launchers.h"
#include "depthwise_launchers.h"
#include "launch.h"

namespace lka::cuda {

// Launches kernel<Storage> of a planned launch, or nothing where it has no blocks.
#define LKA_LAUNCH_ADAPTER(KERNEL, STORAGE, SHAPE, STREAM, ...)                          \
  do {                                                                                   \
    if ((SHAPE).blocks == 0) break;                                                      \
    switch (STORAGE) {                                                                   \
      case Storage::float32:                                                             \
        launch(#KERNEL "<float32>", KERNEL<Float32>, SHAPE, STREAM, __VA_ARGS__);        \
        break;                                                                           \
      case Storage::bfloat16:                                                            \
        launch(#KERNEL "<bfloat16>", KERNEL<BFloat16>, SHAPE, STREAM, __VA_ARGS__);      \
        break;                                                                           \
      default: launch(#KERNEL "<float16>", KERNEL<Float16>, SHAPE, STREAM, __VA_ARGS__); \
    }                                                                                    \
  } while (false)

}  // namespace lka::cuda
