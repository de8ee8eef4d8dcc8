// SPDX-License-Identifier: Apache-2.0
// value * gelu(gate) of the two halves of each row, for the CPU, in one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "../include/half.h"
#include "dispatch.h"
#include "gelu.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 16;  // rows of a task at least

template <typename T>
struct Geglu {
  const T* projected;  // [M, 2 N]
  T* out;              // [M, N]
  int64_t width;       // N

  template <typename Bytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, Bytes) const {
    for (int64_t row = begin; row < end; ++row) {
      const T* __restrict value = projected + 2 * row * width;
      const T* __restrict gate = value + width;
      T* __restrict to = out + row * width;
      for (int64_t c = 0; c < width; ++c) {
        to[c] = narrow<T>(widen(value[c]) * gelu(widen(gate[c])));
      }
    }
  }
};

template <typename T>
void launch(const Tensor& projected, const Tensor& out, int64_t rows, int64_t width) {
  const Geglu<T> body{static_cast<const T*>(projected.const_data_ptr()),
                      static_cast<T*>(out.mutable_data_ptr()), width};
  parallel_dispatch(rows, kGrain, body);
}

Tensor geglu(Tensor projected) {
  const ScalarType type = projected.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "geglu: projected must be float32, bfloat16 or float16.");
  STD_TORCH_CHECK(projected.dim() == 3 && projected.size(2) % 2 == 0 && projected.is_contiguous(),
                  "geglu: projected must be contiguous [B, L, 2 N].");
  const int64_t width = projected.size(2) / 2, rows = projected.size(0) * projected.size(1);
  Tensor out = torch::stable::new_empty(projected, {projected.size(0), projected.size(1), width});
  if (out.numel() > 0) {
    if (type == ScalarType::Float) {
      launch<float>(projected, out, rows, width);
    } else if (type == ScalarType::BFloat16) {
      launch<BFloat16>(projected, out, rows, width);
    } else {
      launch<Float16>(projected, out, rows, width);
    }
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) { m.impl("geglu", TORCH_BOX(&geglu)); }

}  // namespace
}  // namespace ssldiff
