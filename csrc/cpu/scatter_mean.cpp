// SPDX-License-Identifier: Apache-2.0
// scatter_mean for the CPU; the equation stands in ops/scatter_mean.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "../include/half.h"
#include "../include/window_geometry.h"
#include "dispatch.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A task is a tile of the canvas. Rows share each window's cache lines; the accumulator of a tile,
// kTileRows x kTileColumns floats, stays in the first-level cache.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 1024;

template <typename T, typename Acc>
struct ScatterMean {
  const T* windows;  // [P * Q, C, h, w], rows of `lanes * w` contiguous elements
  Acc* canvas;       // [C, H, W], contiguous
  int64_t stride_n, stride_c, stride_y;
  int64_t height, width, window_height, window_width;
  const std::vector<int64_t>& origins_y;
  const std::vector<int64_t>& origins_x;
  const Acc* weight_y;  // [h]
  const Acc* weight_x;  // [w * lanes], each weight repeated for the channels of its pixel
  const Acc* norm_y;    // [H], sum over the window rows that cover y
  const Acc* norm_x;    // [W]
  int64_t lanes;        // 1: planes of one channel; C: all channels of a pixel side by side
  int64_t planes;       // C or 1
  int64_t tile_columns, tiles_y, tiles_x;

  template <typename Bytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, Bytes) const {
    std::vector<Acc> sums(kTileRows * tile_columns * lanes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = (task / tiles_x) % planes;
      const int64_t y = task / (tiles_x * planes) * kTileRows;
      const int64_t x = task % tiles_x * tile_columns;
      const Range rows{y, std::min(y + kTileRows, height)};
      const Range columns{x, std::min(x + tile_columns, width)};
      std::fill(sums.begin(), sums.end(), Acc(0));
      add_windows(plane, rows, columns, sums.data());
      store(plane, rows, columns, sums.data());
    }
  }

  // Each pixel sums its windows in row-major order of origins, whatever the tile.
  SSLDIFF_INLINE void add_windows(int64_t plane, Range rows, Range columns, Acc* sums) const {
    const int64_t pitch = tile_columns * lanes;
    const int64_t count_x = static_cast<int64_t>(origins_x.size());
    const Range ps = windows_covering(origins_y.data(), static_cast<int64_t>(origins_y.size()),
                                      window_height, rows.begin, rows.end - 1);
    const Range qs =
        windows_covering(origins_x.data(), count_x, window_width, columns.begin, columns.end - 1);
    for (int64_t p = ps.begin; p < ps.end; ++p) {
      const int64_t top = std::max(rows.begin, origins_y[p]);
      const int64_t bottom = std::min(rows.end, origins_y[p] + window_height);
      for (int64_t q = qs.begin; q < qs.end; ++q) {
        const int64_t left = std::max(columns.begin, origins_x[q]);
        const int64_t right = std::min(columns.end, origins_x[q] + window_width);
        const int64_t v = (left - origins_x[q]) * lanes;
        const T* window = windows + (p * count_x + q) * stride_n + plane * stride_c + v;
        for (int64_t row = top; row < bottom; ++row) {
          const int64_t u = row - origins_y[p];
          prefetch(window + stride_n + u * stride_y, (right - left) * lanes);
          add_row(window + u * stride_y, weight_y[u], weight_x + v, (right - left) * lanes,
                  sums + (row - rows.begin) * pitch + (left - columns.begin) * lanes);
        }
      }
    }
  }

  // The next window's row lies far away, where hardware does not look ahead. (An address past the
  // last window is harmless: prefetching never faults.)
  SSLDIFF_INLINE static void prefetch(const T* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(row + i);
    }
  }

  SSLDIFF_INLINE static void add_row(const T* __restrict window, Acc weight_u,
                                     const Acc* __restrict weight_v, int64_t count,
                                     Acc* __restrict sum) {
    for (int64_t i = 0; i < count; ++i) {
      sum[i] += weight_u * weight_v[i] * widen(window[i]);
    }
  }

  SSLDIFF_INLINE void store(int64_t plane, Range rows, Range columns, const Acc* sums) const {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const Acc* sum = sums + (row - rows.begin) * tile_columns * lanes;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        Acc* __restrict out = canvas + ((plane * lanes + lane) * height + row) * width;
        for (int64_t x = columns.begin; x < columns.end; ++x) {
          out[x] = sum[(x - columns.begin) * lanes + lane] / (norm_y[row] * norm_x[x]);
        }
      }
    }
  }
};

// sum_k a(x - o_k) for every position of one axis; the two-dimensional normaliser is the product
// of two of these, because lattice and weights are separable.
template <typename Acc>
std::vector<Acc> axis_norm(const std::vector<int64_t>& origins, const std::vector<Acc>& weight,
                           int64_t size) {
  std::vector<Acc> norm(size, Acc(0));
  for (const int64_t origin : origins) {
    for (size_t u = 0; u < weight.size(); ++u) {
      norm[origin + static_cast<int64_t>(u)] += weight[u];
    }
  }
  return norm;
}

template <typename T, typename Acc>
void launch(const Tensor& windows, const Tensor& canvas, const std::vector<int64_t>& origins_y,
            const std::vector<int64_t>& origins_x, const std::vector<double>& weight_y,
            const std::vector<double>& weight_x) {
  const int64_t channels = windows.size(1);
  const bool interleaved = windows.stride(3) != 1;
  const int64_t lanes = interleaved ? channels : 1;
  const std::vector<Acc> row_weight(weight_y.begin(), weight_y.end());
  const std::vector<Acc> column_weight(weight_x.begin(), weight_x.end());
  std::vector<Acc> lane_weight;
  for (const Acc weight : column_weight) {
    lane_weight.insert(lane_weight.end(), lanes, weight);
  }
  const auto norm_y = axis_norm(origins_y, row_weight, canvas.size(1));
  const auto norm_x = axis_norm(origins_x, column_weight, canvas.size(2));
  const int64_t tile_columns =
      std::min(canvas.size(2), std::max<int64_t>(kTileColumns / lanes, 16));
  const ScatterMean<T, Acc> body{static_cast<const T*>(windows.const_data_ptr()),
                                 static_cast<Acc*>(canvas.mutable_data_ptr()),
                                 windows.stride(0),
                                 windows.stride(1),
                                 windows.stride(2),
                                 canvas.size(1),
                                 canvas.size(2),
                                 windows.size(2),
                                 windows.size(3),
                                 origins_y,
                                 origins_x,
                                 row_weight.data(),
                                 lane_weight.data(),
                                 norm_y.data(),
                                 norm_x.data(),
                                 lanes,
                                 interleaved ? 1 : channels,
                                 tile_columns,
                                 (canvas.size(1) + kTileRows - 1) / kTileRows,
                                 (canvas.size(2) + tile_columns - 1) / tile_columns};
  parallel_dispatch(body.tiles_y * body.planes * body.tiles_x, 1, body);
}

Tensor scatter_mean(Tensor windows, std::vector<int64_t> origins_y, std::vector<int64_t> origins_x,
                    std::vector<double> weight_y, std::vector<double> weight_x, int64_t height,
                    int64_t width) {
  check_lattice(windows, origins_y, origins_x, weight_y, weight_x, height, width);
  const bool planar = windows.stride(3) == 1;
  const bool interleaved = windows.stride(1) == 1 && windows.stride(3) == windows.size(1);
  if (!planar && !interleaved) {
    windows = torch::stable::contiguous(windows);
  }
  const ScalarType type = windows.scalar_type();
  const ScalarType out_type = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor canvas = torch::stable::new_empty(windows, {windows.size(1), height, width}, out_type);
  if (canvas.numel() == 0) {
    return canvas;
  }
  if (type == ScalarType::Double) {
    launch<double, double>(windows, canvas, origins_y, origins_x, weight_y, weight_x);
  } else if (type == ScalarType::BFloat16) {
    launch<BFloat16, float>(windows, canvas, origins_y, origins_x, weight_y, weight_x);
  } else if (type == ScalarType::Half) {
    launch<Float16, float>(windows, canvas, origins_y, origins_x, weight_y, weight_x);
  } else {
    launch<float, float>(windows, canvas, origins_y, origins_x, weight_y, weight_x);
  }
  return canvas;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) { m.impl("scatter_mean", TORCH_BOX(&scatter_mean)); }

}  // namespace
}  // namespace ssldiff
