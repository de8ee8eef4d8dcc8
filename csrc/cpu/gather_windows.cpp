// SPDX-License-Identifier: Apache-2.0
// gather_windows for the CPU; the equation stands in ops/gather_windows.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../window_checks.h"
#include "dispatch.h"
#include "vectors.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kBlock = 64;     // columns that are cast together
constexpr int64_t kGrain = 8;  // rows of windows of a task at least
// Bytes of a window that are fetched before they are wanted; its rows lie far from one another,
// where hardware does not look ahead.
constexpr int64_t kAheadBytes = 8192;

template <typename From, typename To>
struct GatherWindows {
  const From* canvas;  // [C, rows, W], rows contiguous
  To* windows;         // [N, C, h, w] planar, or [N, h, w, C] interleaved, contiguous
  int64_t stride_c, stride_y;
  int64_t channels, width, window_height, window_width;
  const int64_t* first_rows;  // [N], of each window, in the rows given; may run over `period`
  const int64_t* origins_x;   // [N]
  int64_t period;             // rows after which windows go on at the first
  bool interleaved;
  int64_t ahead;  // elements from a row to that which is fetched
  bool streams;   // whether the output is larger than the caches

  // A task is one row of one window: of a channel (planar), so that the output is written from its
  // beginning to its end, or of all channels.
  template <int kBytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, VectorBytes<kBytes>) const {
    const int64_t planes = interleaved ? 1 : channels;
    for (int64_t task = begin; task < end;) {
      const int64_t plane = task / window_height, n = plane / planes;
      const int64_t u = task % window_height;
      const int64_t rows = std::min(window_height - u, end - task);
      const From* from = canvas + (interleaved ? 0 : plane % planes * stride_c);
      // A division costs as much as ten columns: there is none for a row.
      int64_t row = (first_rows[n] + u) % period;
      for (int64_t last = task + rows; task < last; ++task) {
        gather_row<kBytes>(from + row * stride_y, origins_x[n], task);
        row = row + 1 < period ? row + 1 : 0;
      }
    }
    stream_fence();
  }

  // `from`: the canvas row, of the first channel wanted.
  template <int kBytes>
  SSLDIFF_INLINE void gather_row(const From* from, int64_t x, int64_t task) const {
    const int64_t first = std::min(window_width, width - x);
    if (!interleaved) {
      To* to = windows + task * window_width;
      copy<kBytes>(from + x, to, first);
      copy<kBytes>(from, to + first, window_width - first);
    } else {
      To* to = windows + task * window_width * channels;
      interleave<kBytes>(from + x, to, first);
      interleave<kBytes>(from, to + first * channels, window_width - first);
    }
  }

  // Into the second-level cache. (An address past the canvas is harmless: prefetching never
  // faults.)
  SSLDIFF_INLINE void prefetch(const From* from) const {
    constexpr int kLine = static_cast<int>(kLineBytes / sizeof(From));
    for (int i = 0; i < kBlock; i += kLine) {
      __builtin_prefetch(from + ahead + i, 0, 2);
    }
  }

  template <int kBytes>
  SSLDIFF_INLINE void copy(const From* from, To* to, int64_t count) const {
    constexpr int kLanes = kBytes / static_cast<int>(sizeof(To));
    const bool past = streams && reinterpret_cast<uintptr_t>(to) % kBytes == 0;
    int64_t first = 0;
    for (; first + kBlock <= count; first += kBlock) {
      prefetch(from + first);
      for (int64_t i = first; i < first + kBlock; i += kLanes) {
        store_vector<kBytes>(to + i, cast_lanes<kBytes, From, To>(from + i), past);
      }
    }
    cast_row(from + first, to + first, count - first);
  }

  // The channels of each pixel side by side; vectorised for the numbers that latents have.
  template <int kBytes>
  SSLDIFF_INLINE void interleave(const From* from, To* to, int64_t count) const {
    int64_t done = 0;
    if (channels == 1) {
      return copy<kBytes>(from, to, count);
    }
    // Before SSSE3 a permutation has no instruction.
    if constexpr (kBytes > 16) {
      if (channels == 3) {
        done = interleave_channels<kBytes, 3>(from, to, count);
      } else if (channels == 4) {
        done = interleave_channels<kBytes, 4>(from, to, count);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = done; i < count; ++i) {
        to[i * channels + c] = cast_one<From, To>(from[c * stride_c + i]);
      }
    }
  }

  // Returns how many pixels it did: whole blocks.
  template <int kBytes, int kChannels>
  SSLDIFF_INLINE int64_t interleave_channels(const From* from, To* to, int64_t count) const {
    constexpr int kLanes = kBytes / static_cast<int>(sizeof(To));
    const bool past = streams && reinterpret_cast<uintptr_t>(to) % kBytes == 0;
    int64_t first = 0;
    for (; first + kBlock <= count; first += kBlock) {
      for (int c = 0; c < kChannels; ++c) {
        prefetch(from + c * stride_c + first);
      }
      for (int64_t i = first; i < first + kBlock; i += kLanes) {
        Vector<LaneOf<To>, kBytes> lanes[kChannels];
        for (int c = 0; c < kChannels; ++c) {
          lanes[c] = cast_lanes<kBytes, From, To>(from + c * stride_c + i);
        }
        store_interleaved<kBytes, kChannels>(lanes, reinterpret_cast<char*>(to + i * kChannels),
                                             past, std::make_index_sequence<kChannels>());
      }
    }
    return first;
  }
};

template <typename From, typename To>
void launch(const Tensor& canvas, const Tensor& windows, const GatherPlan& plan, bool interleaved) {
  const int64_t planes = interleaved ? 1 : canvas.size(0);
  const int64_t row_bytes =
      plan.window_width * canvas.size(0) / planes * static_cast<int64_t>(sizeof(From));
  const int64_t ahead = std::max<int64_t>(1, kAheadBytes / row_bytes);
  const int64_t bytes = windows.numel() * static_cast<int64_t>(sizeof(To));
  const GatherWindows<From, To> body{static_cast<const From*>(canvas.const_data_ptr()),
                                     static_cast<To*>(windows.mutable_data_ptr()),
                                     canvas.stride(0),
                                     canvas.stride(1),
                                     canvas.size(0),
                                     canvas.size(2),
                                     plan.window_height,
                                     plan.window_width,
                                     plan.first_rows.data(),
                                     plan.origins_x.data(),
                                     plan.period,
                                     interleaved,
                                     ahead * canvas.stride(1),
                                     bytes >= kStreamBytes};
  parallel_dispatch(windows.size(0) * planes * plan.window_height, kGrain, body);
}

template <typename From>
void launch_to(const Tensor& canvas, const Tensor& windows, const GatherPlan& plan,
               bool interleaved) {
  const ScalarType type = windows.scalar_type();
  if (type == ScalarType::Double) {
    launch<From, double>(canvas, windows, plan, interleaved);
  } else if (type == ScalarType::BFloat16) {
    launch<From, BFloat16>(canvas, windows, plan, interleaved);
  } else if (type == ScalarType::Half) {
    launch<From, Float16>(canvas, windows, plan, interleaved);
  } else {
    launch<From, float>(canvas, windows, plan, interleaved);
  }
}

Tensor gather_windows(Tensor canvas, Tensor index, std::vector<int64_t> origins_y,
                      std::vector<int64_t> origins_x, std::vector<int64_t> geometry,
                      ScalarType dtype, bool channels_last) {
  const GatherPlan plan = check_gather(canvas, index, origins_y, origins_x, geometry, dtype);
  const int64_t count = index.numel();
  const int64_t channels = canvas.size(0);
  // Channels-last is a contiguous [N, h, w, C], seen as [N, C, h, w].
  Tensor windows =
      channels_last ? torch::stable::new_empty(
                          canvas, {count, plan.window_height, plan.window_width, channels}, dtype)
                    : torch::stable::new_empty(
                          canvas, {count, channels, plan.window_height, plan.window_width}, dtype);
  if (windows.numel() > 0) {
    if (canvas.stride(2) != 1) {
      canvas = torch::stable::contiguous(canvas);
    }
    const ScalarType type = canvas.scalar_type();
    if (type == ScalarType::Double) {
      launch_to<double>(canvas, windows, plan, channels_last);
    } else if (type == ScalarType::BFloat16) {
      launch_to<BFloat16>(canvas, windows, plan, channels_last);
    } else if (type == ScalarType::Half) {
      launch_to<Float16>(canvas, windows, plan, channels_last);
    } else {
      launch_to<float>(canvas, windows, plan, channels_last);
    }
  }
  return channels_last ? channels_first(windows) : windows;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) { m.impl("gather_windows", TORCH_BOX(&gather_windows)); }

}  // namespace
}  // namespace ssldiff
