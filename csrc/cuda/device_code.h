// Whether a device can run what this library was compiled for: plain C++, a pure function.
#pragma once

#include <string>

namespace lka::cuda {

// Versions are 10 · major + minor.
struct DeviceCode {
  int capability = 0;  // of the device
  int compiled = 0;  // what its kernels were compiled for, as machine code or PTX; 0: there is none
};

// mma.sync of 16-bit types, ldmatrix and cp.async. Compiled for less, kernels that need them are
// empty and trap.
constexpr int kLeastOfTensorCores = 80;

// Why no kernel can run, or with `tensor_cores` none of those that need compute capability 8.0;
// empty if it can. PTX is translated for newer devices, but remains what it was compiled for.
inline std::string why_device_cannot(const DeviceCode& code, bool tensor_cores) {
  const auto version = [](int v) { return std::to_string(v / 10) + "." + std::to_string(v % 10); };
  const std::string least = version(kLeastOfTensorCores), found = version(code.capability);
  if (tensor_cores && code.capability < kLeastOfTensorCores)
    return "it needs compute capability " + least + " or newer; the device has " + found;
  const std::string again = "; reinstall with TORCH_CUDA_ARCH_LIST=" + found;
  if (code.compiled == 0)
    return "the library holds no kernels for compute capability " + found + " of the device" +
           again;
  if (tensor_cores && code.compiled < kLeastOfTensorCores)
    return "it needs kernels compiled for compute capability " + least +
           " or newer; for the device, of " + found + ", the library holds PTX of " +
           version(code.compiled) + again;
  return {};
}

// The same of a device, or nothing where the index names none. Found once for each device.
std::string why_device_cannot(int device, bool tensor_cores);

// Whether this process's torch has the function by which launches find their stream.
bool finds_current_stream();

}  // namespace lka::cuda
