// SPDX-License-Identifier: Apache-2.0
// vq_nearest for the CPU; the equation stands in ops/vq_nearest.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "dispatch.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 64;  // vectors of one task

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  using Index = int32_t;
};

template <>
struct Lanes<double> {
  using Index = int64_t;
};

// kGroup SIMD registers full of vectors pass over the codes together, so that one register's
// latency hides behind the other's; `<` over ascending codes keeps the first of equal distances.
constexpr int kGroup = 2;

// kWidth is D, or 0 where D is known at run time only.
template <typename T, int kWidth>
struct VqNearest {
  const T* z;      // [M, D]
  const T* codes;  // [K, D]
  T* vectors;      // [M, D]
  int64_t* indices;
  int64_t count, code_count, runtime_width;

  SSLDIFF_INLINE int64_t width() const { return kWidth > 0 ? kWidth : runtime_width; }

  // Tasks are blocks of kBlock vectors, whatever the register's width.
  template <int kBytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, VectorBytes<kBytes>) const {
    constexpr int64_t kLanes = kGroup * kBytes / static_cast<int64_t>(sizeof(T));
    std::vector<T> transposed(width() * kLanes);
    const int64_t last = std::min(end * kBlock, count);
    for (int64_t first = begin * kBlock; first < last; first += kLanes) {
      const int64_t lanes = std::min(kLanes, last - first);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t row = first + std::min(lane, lanes - 1);
        for (int64_t d = 0; d < width(); ++d) {
          transposed[d * kLanes + lane] = z[row * width() + d];
        }
      }
      search<kBytes>(transposed.data(), first, lanes);
    }
  }

  template <int kBytes>
  SSLDIFF_INLINE void search(const T* transposed, int64_t first, int64_t lanes) const {
    using Index = typename Lanes<T>::Index;
    typedef T Vector __attribute__((vector_size(kBytes)));
    typedef Index IndexVector __attribute__((vector_size(kBytes)));
    constexpr int64_t kLanes = kBytes / static_cast<int64_t>(sizeof(T));
    Vector block[kGroup][kWidth > 0 ? kWidth : 1];
    for (int d = 0; d < kWidth; ++d) {
      for (int g = 0; g < kGroup; ++g) {
        __builtin_memcpy(&block[g][d], transposed + (d * kGroup + g) * kLanes, kBytes);
      }
    }
    Vector best[kGroup];
    IndexVector best_index[kGroup];
    for (int g = 0; g < kGroup; ++g) {
      best[g] = Vector{} + std::numeric_limits<T>::infinity();
      best_index[g] = IndexVector{};
    }
    for (int64_t k = 0; k < code_count; ++k) {
      const T* code = codes + k * width();
      Vector distance[kGroup] = {};
      for (int64_t d = 0; d < width(); ++d) {
        for (int g = 0; g < kGroup; ++g) {
          Vector component;
          if constexpr (kWidth > 0) {
            component = block[g][d];
          } else {
            __builtin_memcpy(&component, transposed + (d * kGroup + g) * kLanes, kBytes);
          }
          const Vector difference = component - code[d];
          const Vector square = difference * difference;
          distance[g] = d == 0 ? square : distance[g] + square;
        }
      }
      for (int g = 0; g < kGroup; ++g) {
        const IndexVector closer = distance[g] < best[g];
        best[g] = closer ? distance[g] : best[g];
        best_index[g] = closer ? IndexVector{} + static_cast<Index>(k) : best_index[g];
      }
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      store(first + lane, static_cast<int64_t>(best_index[lane / kLanes][lane % kLanes]));
    }
  }

  SSLDIFF_INLINE void store(int64_t row, int64_t index) const {
    indices[row] = index;
    for (int64_t d = 0; d < width(); ++d) {
      vectors[row * width() + d] = codes[index * width() + d];
    }
  }
};

template <typename T, int kWidth>
void launch(const Tensor& z, const Tensor& codes, const Tensor& vectors, const Tensor& indices) {
  const VqNearest<T, kWidth> body{static_cast<const T*>(z.const_data_ptr()),
                                  static_cast<const T*>(codes.const_data_ptr()),
                                  static_cast<T*>(vectors.mutable_data_ptr()),
                                  static_cast<int64_t*>(indices.mutable_data_ptr()),
                                  z.size(0),
                                  codes.size(0),
                                  z.size(1)};
  parallel_dispatch((z.size(0) + kBlock - 1) / kBlock, 1, body);
}

template <typename T>
void launch_width(const Tensor& z, const Tensor& codes, const Tensor& vectors,
                  const Tensor& indices) {
  switch (z.size(1)) {
    case 3:
      return launch<T, 3>(z, codes, vectors, indices);
    case 4:
      return launch<T, 4>(z, codes, vectors, indices);
    default:
      return launch<T, 0>(z, codes, vectors, indices);
  }
}

std::tuple<Tensor, Tensor> vq_nearest(Tensor z, Tensor codes) {
  check_codes(z, codes);
  z = torch::stable::contiguous(z);
  codes = torch::stable::contiguous(codes);
  Tensor vectors = torch::stable::new_empty(z, {z.size(0), z.size(1)});
  Tensor indices = torch::stable::new_empty(z, {z.size(0)}, ScalarType::Long);
  if (z.size(0) == 0) {
    return {vectors, indices};
  }
  if (z.scalar_type() == ScalarType::Double) {
    launch_width<double>(z, codes, vectors, indices);
  } else {
    launch_width<float>(z, codes, vectors, indices);
  }
  return {vectors, indices};
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) { m.impl("vq_nearest", TORCH_BOX(&vq_nearest)); }

}  // namespace
}  // namespace ssldiff
