// Bridges between LibTorch's stable ABI and the kernels: tensors stop here.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "conv_params.h"

namespace lka {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Storage storage_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

inline int64_t element_size(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

// An uninitialised tensor on `like`'s device, with explicit strides.
inline Tensor empty_strided(const Tensor& like, std::initializer_list<int64_t> sizes,
                            const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(),
                                                         strides, dtype_code, device_type,
                                                         device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8] = {}, step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes.begin()[i] > 1 ? sizes.begin()[i] : 1;
  }
  return empty_strided(like, sizes, strides, dtype);
}

// A map (B, C, H, W) in the memory format that torch gives a fresh tensor.
inline Tensor empty_map(const Tensor& like, int64_t b, int64_t c, int64_t h, int64_t w,
                        bool channels_last) {
  const auto at_least_1 = [](int64_t n) { return n > 1 ? n : 1; };
  const ScalarType dtype = like.scalar_type();
  if (!channels_last) return empty(like, {b, c, h, w}, dtype);
  const int64_t row = at_least_1(c) * at_least_1(w);
  const int64_t strides[4] = {row * at_least_1(h), 1, row, at_least_1(c)};
  return empty_strided(like, {b, c, h, w}, strides, dtype);
}

inline MapView view_of(const Tensor& t) {
  MapView view;
  view.data = t.data_ptr();
  view.height = t.size(2);
  view.width = t.size(3);
  view.stride_b = t.stride(0);
  view.stride_c = t.stride(1);
  view.stride_h = t.stride(2);
  view.stride_w = t.stride(3);
  return view;
}

}  // namespace lka
