// What every launcher needs: device, stream, storage types, errors. Included by .cu files only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include "../conv_params.h"
#include "launch_shape.h"

namespace lka::cuda {

// torch's function for the current stream, or null. Looked up when first needed, so that the
// library also loads beside a torch without CUDA. Python loads torch's libraries without making
// their names global, so that the one that has it must be asked.
using GetStream = int32_t (*)(int32_t, void**);
inline GetStream find_current_stream() {
  static const GetStream found = [] {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, kName);
    if (symbol == nullptr)
      if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
        symbol = dlsym(library, kName);
    return reinterpret_cast<GetStream>(symbol);
  }();
  return found;
}

inline cudaStream_t current_stream(int device) {
  const GetStream get = find_current_stream();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA stream to launch on");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "no current stream on CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    int current = 0;
    check(cudaGetDevice(&current), device);
    if (current == device) return;
    check(cudaSetDevice(device), device);
    previous_ = current;
  }
  ~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static void check(cudaError_t error, int device) {
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", device, ": ", cudaGetErrorString(error));
  }

  int previous_ = -1;  // none to return to
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", device, ": ", cudaGetErrorString(error));
  return value;
}

// Lets a kernel have all dynamic shared memory that the current device can give: less, for the call
// at hand, would be taken from a launch of the same kernel by another thread.
template <class Kernel>
cudaError_t allow_large_shared_memory(Kernel kernel) {
  int device = 0, most = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - int(attributes.sharedSizeBytes));
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
  return error;
}

// One launch on `stream`; an exception names kernel and configuration. Nothing here touches the
// stream otherwise, so that a graph can capture it.
template <class Kernel, class... Arguments>
void launch(const char* name, Kernel kernel, const LaunchShape& shape, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > 48 * 1024) error = allow_large_shared_memory(kernel);
  if (error == cudaSuccess) {
    kernel<<<unsigned(shape.blocks), unsigned(shape.threads), size_t(shape.shared_bytes), stream>>>(
        arguments...);
    error = cudaGetLastError();
  }
  STD_TORCH_CHECK(error == cudaSuccess, "launch of ", name, " with ", shape.blocks, " blocks of ",
                  shape.threads, " threads and ", shape.shared_bytes,
                  " bytes of shared memory failed: ", cudaGetErrorString(error));
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

}  // namespace lka::cuda
