// SPDX-License-Identifier: Apache-2.0
// What one task of scatter_mean does on the CPU; knows no torch but its thread pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../include/half.h"
#include "../include/window_lattice.h"
#include "dispatch.h"
#include "philox_block.h"

namespace ssldiff {

// A task is a tile of the canvas. Rows share each window's cache lines; the accumulator of a tile,
// kTileRows x kTileColumns floats, stays in the first-level cache.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 512;
constexpr int64_t kMinTileColumns = 64;
constexpr uintptr_t kCacheLine = 64;
constexpr int64_t kBlock = 64;  // columns that are added together, and at the border
constexpr int64_t kSmallBlock = 16;
constexpr int64_t kNormals = 64;  // drawn at a time

enum class Guidance { kNone, kOfWindow, kOfPixel };

// Everything but the windows' dtype; arrays of the canvas hold the rows that are made.
template <typename Acc>
struct Canvas {
  int64_t height, width;  // rows made, and all columns
  int64_t first_row;
  Acc* out;  // [C, rows, W]
  const AxisWindows& rows;
  const AxisWindows& columns;
  const int64_t* slots;   // [rows of windows, columns of windows]; -1: left out
  const uint8_t* whole;   // [rows of windows]: none of them is left out
  const Acc* weight_y;    // [h]
  const Acc* weight_x;    // [w * lanes], each weight repeated for the channels of its pixel
  const Acc* norm_y;      // [rows], sum over the window rows that cover y; null: do not divide
  const Acc* norm_x;      // [W]
  const Acc* background;  // [C, rows, W] or null
  // Of the affine step; null: out is the mean.
  const Acc* canvas;        // [C, rows, W]
  const Acc* previous;      // [C, rows, W] or null
  Acc* denoised;            // [C, rows, W] or null
  const Acc* coefficients;  // x, output, noise, history, denoised x, denoised output
  uint64_t seed;
  int64_t step;
};

template <typename T, typename Acc, Guidance kGuidance>
struct ScatterMean {
  const T* windows;  // [M, C, h, w], rows of `lanes * w` contiguous elements
  const T* uncond;   // likewise, with the same strides; null without guidance
  const Acc* scale;  // [M], or [rows, W] of a pixel
  int64_t stride_n, stride_c, stride_y;
  int64_t window_height, window_width;
  int64_t lanes;   // 1: planes of one channel; C: all channels of a pixel side by side
  int64_t planes;  // C or 1
  int64_t tile_columns, tiles_y, tiles_x;
  Canvas<Acc> to;

  // A tile's arrays: sums and scales have `pitch` entries a row, the rest one for each column.
  struct Scratch {
    std::vector<Acc> store, scales, norm;
    Acc* sums;  // in `store`, at a cache line: vectors that lie across two cost twice
    alignas(64) float normals[kNormals];
  };

  template <int kBytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, VectorBytes<kBytes>) const {
    Scratch scratch;
    const int64_t count = kTileRows * tile_columns * lanes;
    scratch.store.resize(count + kCacheLine / sizeof(Acc));
    scratch.sums = reinterpret_cast<Acc*>(
        (reinterpret_cast<uintptr_t>(scratch.store.data()) + kCacheLine - 1) & ~(kCacheLine - 1));
    scratch.norm.resize(tile_columns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = (task / tiles_x) % planes;
      const int64_t y = task / (tiles_x * planes) * kTileRows;
      const int64_t x = task % tiles_x * tile_columns;
      const Range rows{y, std::min(y + kTileRows, to.height)};
      const Range columns{x, std::min(x + tile_columns, to.width)};
      std::fill(scratch.sums, scratch.sums + count, Acc(0));
      if (kGuidance == Guidance::kOfPixel) {
        spread_scale(rows, columns, scratch);
      }
      add_windows(plane, rows, columns, scratch);
      store<kBytes>(plane, rows, columns, scratch);
    }
  }

  // The scale of each pixel, repeated for its channels.
  SSLDIFF_INLINE void spread_scale(Range rows, Range columns, Scratch& scratch) const {
    scratch.scales.resize(kTileRows * tile_columns * lanes);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      Acc* spread = scratch.scales.data() + (row - rows.begin) * tile_columns * lanes;
      for (int64_t x = columns.begin; x < columns.end; ++x) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          *spread++ = scale[row * to.width + x];
        }
      }
    }
  }

  // Each pixel sums its windows in row-major order of origins, whatever the tile.
  SSLDIFF_INLINE void add_windows(int64_t plane, Range rows, Range columns,
                                  Scratch& scratch) const {
    const int64_t first_row = to.first_row;
    const Range ps = windows_covering(to.rows.origins.data(), to.rows.count(), window_height,
                                      first_row + rows.begin, first_row + rows.end - 1);
    const Range qs = windows_covering(to.columns.origins.data(), to.columns.count(), window_width,
                                      columns.begin, columns.end - 1);
    for (int64_t p = ps.begin; p < ps.end; ++p) {
      const int64_t origin_y = to.rows.origins[p] - first_row;
      const Range ys{std::max(rows.begin, origin_y), std::min(rows.end, origin_y + window_height)};
      for (int64_t q = qs.begin; q < qs.end; ++q) {
        const int64_t slot = to.slots[p * to.columns.count() + q];
        if (slot >= 0) {
          add_window(slot, plane, origin_y, to.columns.origins[q], ys, rows, columns, scratch);
        }
      }
    }
  }

  SSLDIFF_INLINE void add_window(int64_t slot, int64_t plane, int64_t origin_y, int64_t origin_x,
                                 Range ys, Range rows, Range columns, Scratch& scratch) const {
    const int64_t pitch = tile_columns * lanes;
    const int64_t left = std::max(columns.begin, origin_x);
    const int64_t count = (std::min(columns.end, origin_x + window_width) - left) * lanes;
    const int64_t v = (left - origin_x) * lanes;
    const int64_t base = slot * stride_n + plane * stride_c + v;
    const Acc of_window = kGuidance == Guidance::kOfWindow ? scale[slot] : Acc(0);
    const Block block{base - origin_y * stride_y,
                      (left - columns.begin) * lanes - rows.begin * pitch, v, origin_y, of_window};
    int64_t first = 0;
    for (; first + kBlock <= count; first += kBlock) {
      add_block<kBlock>(block, first, kBlock, ys, scratch);
    }
    for (; first + kSmallBlock <= count; first += kSmallBlock) {
      add_block<kSmallBlock>(block, first, kSmallBlock, ys, scratch);
    }
    if (first < count) {
      add_block<0>(block, first, count - first, ys, scratch);
    }
  }

  // Where a window lies in the batch, in the tile and among the weights.
  struct Block {
    int64_t from, in_tile, v, origin_y;
    Acc of_window;
  };

  // Some neighbouring columns of a window, row by row; kCount of them where that is not 0. A
  // constant length costs no prologue, and the weights stay in registers.
  template <int64_t kCount>
  SSLDIFF_INLINE void add_block(const Block& block, int64_t first, int64_t rest, Range ys,
                                Scratch& scratch) const {
    const int64_t pitch = tile_columns * lanes;
    const int64_t count = kCount > 0 ? kCount : rest;
    for (int64_t row = ys.begin; row < ys.end; ++row) {
      const int64_t at = block.from + row * stride_y + first;
      const int64_t in_tile = block.in_tile + row * pitch + first;
      prefetch(windows + at + stride_n, count);
      if (kGuidance != Guidance::kNone) {
        prefetch(uncond + at + stride_n, count);
      }
      add_row(windows + at, uncond + at, block.of_window, scratch.scales.data() + in_tile,
              to.weight_y[row - block.origin_y], to.weight_x + block.v + first, count,
              scratch.sums + in_tile);
    }
  }

  // The next window's row lies far away, where hardware does not look ahead. (An address past the
  // last window is harmless: prefetching never faults.)
  SSLDIFF_INLINE static void prefetch(const T* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(row + i);
    }
  }

  SSLDIFF_INLINE static void add_row(const T* __restrict window, const T* __restrict free,
                                     Acc of_window, const Acc* __restrict of_pixel, Acc weight_u,
                                     const Acc* __restrict weight_v, int64_t count,
                                     Acc* __restrict sum) {
    for (int64_t i = 0; i < count; ++i) {
      Acc value = widen(window[i]);
      if (kGuidance != Guidance::kNone) {
        const Acc base = widen(free[i]);
        value = base + (kGuidance == Guidance::kOfPixel ? of_pixel[i] : of_window) * (value - base);
      }
      sum[i] += weight_u * weight_v[i] * value;
    }
  }

  template <int kBytes>
  SSLDIFF_INLINE void store(int64_t plane, Range rows, Range columns, Scratch& scratch) const {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const bool divided = to.norm_y != nullptr;
      const bool whole = !divided || is_whole(row);
      if (!whole) {
        sum_weights(row, columns, to.background != nullptr, scratch.norm.data());
      }
      Acc* sums = scratch.sums + (row - rows.begin) * tile_columns * lanes;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t channel = plane * lanes + lane;
        const int64_t at = (channel * to.height + row) * to.width;
        Acc* __restrict out = to.out + at;
        const Acc* sum = sums + lane;
        if (!divided) {
          for (int64_t x = columns.begin; x < columns.end; ++x) {
            out[x] = sum[(x - columns.begin) * lanes];
          }
        } else if (whole) {
          for (int64_t x = columns.begin; x < columns.end; ++x) {
            out[x] = sum[(x - columns.begin) * lanes] / (to.norm_y[row] * to.norm_x[x]);
          }
        } else {
          divide_part(row, columns, scratch.norm.data(), sum, out,
                      to.background == nullptr ? nullptr : to.background + at);
        }
        if (to.canvas != nullptr) {
          apply_step<kBytes>(channel, row, at, columns, scratch.normals);
        }
      }
    }
  }

  // Whether no window is left out in any window row that covers this row of the canvas.
  SSLDIFF_INLINE bool is_whole(int64_t row) const {
    const int64_t y = to.first_row + row;
    const Range ps = windows_covering(to.rows.origins.data(), to.rows.count(), window_height, y, y);
    bool whole = true;
    for (int64_t p = ps.begin; p < ps.end; ++p) {
      whole = whole && to.whole[p] != 0;
    }
    return whole;
  }

  // The weights of the windows given, or of those left out, at each pixel of a row.
  SSLDIFF_INLINE void sum_weights(int64_t row, Range columns, bool left_out, Acc* norm) const {
    std::fill(norm, norm + (columns.end - columns.begin), Acc(0));
    const int64_t y = to.first_row + row;
    const Range ps = windows_covering(to.rows.origins.data(), to.rows.count(), window_height, y, y);
    const Range qs = windows_covering(to.columns.origins.data(), to.columns.count(), window_width,
                                      columns.begin, columns.end - 1);
    for (int64_t p = ps.begin; p < ps.end; ++p) {
      const Acc weight_u = to.weight_y[y - to.rows.origins[p]];
      for (int64_t q = qs.begin; q < qs.end; ++q) {
        if ((to.slots[p * to.columns.count() + q] < 0) != left_out) {
          continue;
        }
        const int64_t origin = to.columns.origins[q];
        const int64_t right = std::min(columns.end, origin + window_width);
        for (int64_t x = std::max(columns.begin, origin); x < right; ++x) {
          norm[x - columns.begin] += weight_u * to.weight_x[(x - origin) * lanes];
        }
      }
    }
  }

  // A row where windows were left out: they count with the background, or not at all.
  SSLDIFF_INLINE void divide_part(int64_t row, Range columns, const Acc* norm, const Acc* sum,
                                  Acc* __restrict out, const Acc* background) const {
    for (int64_t x = columns.begin; x < columns.end; ++x) {
      const Acc given = sum[(x - columns.begin) * lanes];
      const Acc weight = norm[x - columns.begin];
      if (background == nullptr) {
        out[x] = given / weight;
      } else {
        // A background that has no share is not read, so that it may hold anything there.
        const Acc all = weight > 0 ? given + weight * background[x] : given;
        out[x] = all / (to.norm_y[row] * to.norm_x[x]);
      }
    }
  }

  // out holds the mean; the order of operations is that of diffusion.solvers.apply_step.
  template <int kBytes>
  SSLDIFF_INLINE void apply_step(int64_t channel, int64_t row, int64_t at, Range columns,
                                 float* normals) const {
    const Acc* c = to.coefficients;
    for (int64_t x = columns.begin; x < columns.end; x += kNormals) {
      const int64_t count = std::min(kNormals, columns.end - x);
      const Acc* __restrict canvas = to.canvas + at + x;
      Acc* __restrict out = to.out + at + x;
      if (to.denoised != nullptr) {
        Acc* __restrict denoised = to.denoised + at + x;
        for (int64_t i = 0; i < count; ++i) {
          denoised[i] = c[4] * canvas[i] + c[5] * out[i];
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        out[i] = c[0] * canvas[i] + c[1] * out[i];
      }
      if (c[3] != 0) {
        const Acc* __restrict previous = to.previous + at + x;
        for (int64_t i = 0; i < count; ++i) {
          out[i] += c[3] * previous[i];
        }
      }
      if (c[2] != 0) {
        philox_row<kBytes>(to.seed, channel, to.first_row + row, x, to.step, count, normals);
        for (int64_t i = 0; i < count; ++i) {
          out[i] += c[2] * static_cast<Acc>(normals[i]);
        }
      }
    }
  }
};

}  // namespace ssldiff
