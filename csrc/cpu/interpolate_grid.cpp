// SPDX-License-Identifier: Apache-2.0
// interpolate_grid for the CPU; the equations stand in ops/interpolate_grid.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>

#include "../checks.h"
#include "../include/grid_geometry.h"
#include "dispatch.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sums of products run in this many lanes on every path, so that all give the same bits.
constexpr int64_t kLanes = 8;

template <typename T>
struct InterpolateGrid {
  const T* grid;         // [R, K, T, D], contiguous
  const double* points;  // [N, 2], contiguous
  const bool* valid;     // [R, K], or none
  T* out;                // [N, T, D], contiguous
  int64_t rows, columns, tokens, width;
  GridMode mode;

  template <int kBytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, VectorBytes<kBytes>) const {
    const int64_t size = tokens * width;
    for (int64_t n = begin; n < end; ++n) {
      const GridCorners<T> corners = grid_corners<T>(points + 2 * n, rows, columns, valid);
      const T* cells[4];
      for (int i = 0; i < 4; ++i) {
        cells[i] = grid + corners.cells[i] * size;
      }
      if (mode != GridMode::kSlerp) {
        const GridWeights<T> weights =
            mode == GridMode::kNearest ? nearest_weights(corners) : bilinear_weights(corners);
        add_cells(cells, weights, size, out + n * size);
        continue;
      }
      for (int64_t t = 0; t < tokens; ++t) {
        double products[kGridProducts];
        multiply<kBytes>(cells, products);
        add_cells(cells, slerp_weights(corners, products), width, out + n * size + t * width);
        for (int i = 0; i < 4; ++i) {
          cells[i] += width;
        }
      }
    }
  }

  // Products of the four vectors with each other, in double. Lanes sum by themselves, so that as
  // many of them as fit a register pass over the (short) vectors together, the others after them.
  template <int kBytes>
  SSLDIFF_INLINE void multiply(const T* const* cells, double* products) const {
    constexpr int kTogether = kBytes / static_cast<int>(sizeof(double));
    double sums[kGridProducts][kLanes];
    for (int first = 0; first < kLanes; first += kTogether) {
      multiply_lanes<kBytes>(cells, first, sums);
    }
    for (int i = 0; i < kGridProducts; ++i) {
      products[i] = ((sums[i][0] + sums[i][4]) + (sums[i][2] + sums[i][6])) +
                    ((sums[i][1] + sums[i][5]) + (sums[i][3] + sums[i][7]));
    }
  }

  // Lane `lane` sums the products at lane, lane + kLanes, lane + 2 kLanes and so on.
  template <int kBytes>
  SSLDIFF_INLINE void multiply_lanes(const T* const* cells, int first,
                                     double (*sums)[kLanes]) const {
    typedef double Doubles __attribute__((vector_size(kBytes)));
    typedef T Values __attribute__((vector_size(kBytes * sizeof(T) / sizeof(double))));
    constexpr int kTogether = kBytes / static_cast<int>(sizeof(double));
    Doubles sum[kGridProducts] = {};
    for (int64_t d = first; d < width; d += kLanes) {
      Doubles v[4];
      for (int i = 0; i < 4; ++i) {
        Values values = {};
        if (d + kTogether <= width) {
          __builtin_memcpy(&values, cells[i] + d, sizeof(values));
        } else {
          // Beyond the end: zeros, whose products change no sum.
          T rest[kTogether] = {};
          std::copy(cells[i] + d, cells[i] + width, rest);
          __builtin_memcpy(&values, rest, sizeof(values));
        }
        v[i] = __builtin_convertvector(values, Doubles);
      }
      int product = 0;
      for (int i = 0; i < 4; ++i) {
        for (int j = i; j < 4; ++j) {
          sum[product++] += v[i] * v[j];
        }
      }
    }
    for (int i = 0; i < kGridProducts; ++i) {
      __builtin_memcpy(&sums[i][first], &sum[i], kBytes);
    }
  }

  // The cells of weight above zero, in their order.
  SSLDIFF_INLINE static void add_cells(const T* const* cells, const GridWeights<T>& weights,
                                       int64_t count, T* __restrict sum) {
    const T* a[4] = {};
    T w[4] = {};
    int used = 0;
    for (int i = 0; i < 4; ++i) {
      if (weights.w[i] != 0) {
        a[used] = cells[i];
        w[used++] = weights.w[i];
      }
    }
    if (used == 0) {
      std::fill(sum, sum + count, T(0));
    } else if (used == 1) {
      for (int64_t d = 0; d < count; ++d) {
        sum[d] = w[0] * a[0][d];
      }
    } else if (used == 2) {
      for (int64_t d = 0; d < count; ++d) {
        sum[d] = w[0] * a[0][d] + w[1] * a[1][d];
      }
    } else if (used == 3) {
      for (int64_t d = 0; d < count; ++d) {
        sum[d] = w[0] * a[0][d] + w[1] * a[1][d] + w[2] * a[2][d];
      }
    } else {
      for (int64_t d = 0; d < count; ++d) {
        sum[d] = w[0] * a[0][d] + w[1] * a[1][d] + w[2] * a[2][d] + w[3] * a[3][d];
      }
    }
  }
};

template <typename T>
void launch(const Tensor& grid, const Tensor& points, const std::optional<Tensor>& valid,
            const Tensor& out, GridMode mode) {
  const InterpolateGrid<T> body{
      static_cast<const T*>(grid.const_data_ptr()),
      static_cast<const double*>(points.const_data_ptr()),
      valid.has_value() ? static_cast<const bool*>(valid->const_data_ptr()) : nullptr,
      static_cast<T*>(out.mutable_data_ptr()),
      grid.size(0),
      grid.size(1),
      grid.size(2),
      grid.size(3),
      mode};
  // A task of some 16,000 elements is worth a thread.
  const int64_t grain = std::max<int64_t>(1, 16384 / (grid.size(2) * grid.size(3)));
  parallel_dispatch(points.size(0), grain, body);
}

Tensor interpolate_grid(Tensor grid, Tensor points, std::optional<Tensor> valid,
                        std::string mode_name) {
  const GridMode mode = check_grid(grid, points, valid, mode_name);
  grid = torch::stable::contiguous(grid);
  points = torch::stable::contiguous(points);
  if (valid.has_value()) {
    valid = torch::stable::contiguous(*valid);
  }
  Tensor out = torch::stable::new_empty(grid, {points.size(0), grid.size(2), grid.size(3)});
  if (out.numel() == 0) {
    return out;
  }
  if (grid.scalar_type() == ScalarType::Double) {
    launch<double>(grid, points, valid, out, mode);
  } else {
    launch<float>(grid, points, valid, out, mode);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) {
  m.impl("interpolate_grid", TORCH_BOX(&interpolate_grid));
}

}  // namespace
}  // namespace ssldiff
