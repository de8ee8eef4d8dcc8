// SPDX-License-Identifier: Apache-2.0
// The matrix product at the bottom of convolutions: rows of one matrix times a panel of kPanel
// columns of another, which is packed panel by panel. Each sum runs over its terms in order, in one
// accumulator, by fused multiply-adds: no blocking, number of threads or width of registers changes
// a bit of it (but the portable path, which rounds products too).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "dispatch.h"
#include "vectors.h"

namespace ssldiff {

constexpr int64_t kPanel = 32;  // columns

SSLDIFF_INLINE int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// a * b + c
template <int kBytes>
SSLDIFF_INLINE Vector<float, kBytes> fused(Vector<float, kBytes> a, Vector<float, kBytes> b,
                                           Vector<float, kBytes> c) {
#if SSLDIFF_X86 && defined(__clang__)
  if constexpr (kBytes > 16) {
    return __builtin_elementwise_fma(a, b, c);
  }
#elif SSLDIFF_X86
  if constexpr (kBytes == 64) {
    return __builtin_ia32_vfmaddps512_mask(a, b, c, 0xffff, 4);
  } else if constexpr (kBytes == 32) {
    return __builtin_ia32_vfmaddps256(a, b, c);
  }
#endif
  return a * b + c;
}

// Rows that the registers hold sums of, beside two vectors of columns.
template <int kBytes>
constexpr int kMostRows = kBytes == 64   ? 14
                          : kBytes == 32 ? 6
                                         : 4;

// kRows rows of `a` [.., depth] times two vectors of columns of a panel [depth, kPanel].
template <int kBytes, int kRows>
SSLDIFF_INLINE void product_of_rows(const float* __restrict a, int64_t a_stride, int64_t depth,
                                    const float* __restrict panel, float* __restrict out,
                                    int64_t out_stride) {
  constexpr int64_t kLanes = kBytes / 4;
  using Values = Vector<float, kBytes>;
  Values sums[kRows][2] = {};
  for (int64_t d = 0; d < depth; ++d) {
    const auto b0 = load_lanes<float, kBytes>(panel + d * kPanel);
    const auto b1 = load_lanes<float, kBytes>(panel + d * kPanel + kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
      const Values value = repeat<kBytes>(a[r * a_stride + d]);
      sums[r][0] = fused<kBytes>(value, b0, sums[r][0]);
      sums[r][1] = fused<kBytes>(value, b1, sums[r][1]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) {
    std::memcpy(out + r * out_stride, &sums[r][0], kBytes);
    std::memcpy(out + r * out_stride + kLanes, &sums[r][1], kBytes);
  }
}

template <int kBytes, int kRows = kMostRows<kBytes>>
SSLDIFF_INLINE void product_of_some_rows(int64_t rows, const float* a, int64_t a_stride,
                                         int64_t depth, const float* panel, float* out,
                                         int64_t out_stride) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      product_of_some_rows<kBytes, kRows - 1>(rows, a, a_stride, depth, panel, out, out_stride);
      return;
    }
  }
  for (int64_t half = 0; half < kPanel; half += kBytes / 2) {
    product_of_rows<kBytes, kRows>(a, a_stride, depth, panel + half, out + half, out_stride);
  }
}

// `rows` rows of `a` times one panel; out has the panel's kPanel columns.
template <int kBytes>
SSLDIFF_INLINE void panel_product(int64_t rows, const float* a, int64_t a_stride, int64_t depth,
                                  const float* panel, float* out, int64_t out_stride) {
  const int64_t parts = (rows + kMostRows<kBytes> - 1) / kMostRows<kBytes>;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part * rows / parts, end = (part + 1) * rows / parts;
    product_of_some_rows<kBytes>(end - begin, a + begin * a_stride, a_stride, depth, panel,
                                 out + begin * out_stride, out_stride);
  }
}

}  // namespace ssldiff
