// What the runtime takes of this library for a device. All files are compiled for the same
// architectures, so that one kernel answers for all.
#include <map>
#include <mutex>

#include "device_code.h"
#include "launch.h"

namespace lka::cuda {
namespace {

__global__ void probe_kernel() {}

DeviceCode code_of(int device) {
  DeviceCode code;
  code.capability = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
                    device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion)
    return code;
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", device, ": ", cudaGetErrorString(error));
  // Of machine code that was translated from PTX this is the version of the PTX.
  code.compiled = attributes.ptxVersion;
  return code;
}

}  // namespace

bool finds_current_stream() { return find_current_stream() != nullptr; }

std::string why_device_cannot(int device, bool tensor_cores) {
  static std::mutex mutex;
  static std::map<int, DeviceCode> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(device);
  if (found == known.end()) {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
      cudaGetLastError();
      count = 0;
    }
    if (device < 0 || device >= count) return {};
    found = known.emplace(device, code_of(device)).first;
  }
  return why_device_cannot(found->second, tensor_cores);
}

}  // namespace lka::cuda
