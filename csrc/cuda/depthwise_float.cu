// Launcher of the depthwise correlation in float32.
#include "depthwise_launchers.h"
#include "launch.h"

namespace lka::cuda {
namespace {

__global__ void __launch_bounds__(FloatCorrelate::kThreads)
    float_correlate_kernel(const __grid_constant__ FloatCorrelateParams p) {
  FloatCorrelateThread(p).run();
}

}  // namespace

void float_correlate(const FloatCorrelateParams& p, const LaunchShape& shape, cudaStream_t stream) {
  launch("float_correlate", float_correlate_kernel, shape, stream, p);
}

}  // namespace lka::cuda
