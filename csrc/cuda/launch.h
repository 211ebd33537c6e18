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

// Looked up when first needed, so that the library also loads beside a torch without CUDA.
inline cudaStream_t current_stream(int device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get =
      reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA stream to launch on");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "no current stream on CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), device);
    if (previous_ != device) check(cudaSetDevice(device), device);
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static void check(cudaError_t error, int device) {
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", device, ": ", cudaGetErrorString(error));
  }

  int previous_ = 0;
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", device, ": ", cudaGetErrorString(error));
  return value;
}

// One launch on `stream`; an exception names kernel and configuration. Nothing here touches the
// stream otherwise, so that a graph can capture it.
template <class Kernel, class... Arguments>
void launch(const char* name, Kernel kernel, const LaunchShape& shape, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > 48 * 1024)  // more must be asked for
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shape.shared_bytes));
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
