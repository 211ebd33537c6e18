// What the .cu files of the adapter offer to its operators: planned launches on raw pointers.
#pragma once

#include <cuda_runtime_api.h>

#include "adapter_plan.h"

namespace lka::cuda {

void adapter_forward(Storage storage, const AdapterForward& plan, cudaStream_t stream);

// All but the sums; launches without blocks are left out.
void adapter_backward(Storage storage, const AdapterBackward& plan, cudaStream_t stream);
void adapter_sums(Storage storage, const AdapterSums& sums, const LaunchShape& shape,
                  cudaStream_t stream);

}  // namespace lka::cuda
