// What the .cu files of the adapter offer to its operators: planned launches on raw pointers, in
// the order of adapter_order.h.
#pragma once

#include <cuda_runtime_api.h>

#include "adapter_plan.h"

namespace lka::cuda {

#define LKA_ADAPTER_LAUNCHER(NAME, PARAMS) \
  void NAME(Storage storage, const PARAMS& p, const LaunchShape& shape, cudaStream_t stream);
LKA_ADAPTER_LAUNCHER(adapter_down, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_up, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_narrow_down, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_narrow_up, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_up_backward, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_narrow_up_backward, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_convolve_backward, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_down_backward, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_narrow_down_backward, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_weight_gradient, AdapterParams)
LKA_ADAPTER_LAUNCHER(adapter_sums, AdapterSums)
#undef LKA_ADAPTER_LAUNCHER

}  // namespace lka::cuda
