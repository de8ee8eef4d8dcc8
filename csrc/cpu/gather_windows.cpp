// SPDX-License-Identifier: Apache-2.0
// gather_windows for the CPU; the equation stands in ops/gather_windows.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../include/half.h"
#include "../window_checks.h"
#include "dispatch.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 64;  // columns that are cast together
constexpr int64_t kGrain = 8;   // rows of windows of a task at least

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

  // A task is one row of one window, with all its channels.
  template <typename Bytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, Bytes) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / window_height;
      const int64_t u = task % window_height;
      const int64_t row = (first_rows[n] + u) % period;
      const int64_t x = origins_x[n];
      const int64_t first = std::min(window_width, width - x);
      const From* from = canvas + row * stride_y;
      if (!interleaved) {
        for (int64_t c = 0; c < channels; ++c) {
          To* to = windows + ((n * channels + c) * window_height + u) * window_width;
          copy(from + c * stride_c + x, to, first);
          copy(from + c * stride_c, to + first, window_width - first);
        }
      } else {
        To* to = windows + (n * window_height + u) * window_width * channels;
        interleave(from + x, to, first);
        interleave(from, to + first * channels, window_width - first);
      }
    }
  }

  SSLDIFF_INLINE static To cast(From value) {
    if constexpr (std::is_same_v<From, To>) {
      return value;
    } else {
      return narrow<To>(static_cast<float>(widen(value)));
    }
  }

  SSLDIFF_INLINE static void copy(const From* __restrict from, To* __restrict to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = cast(from[i]);
    }
  }

  // The channels of each pixel side by side; vectorised for the numbers that latents have.
  SSLDIFF_INLINE void interleave(const From* from, To* to, int64_t count) const {
    switch (channels) {
      case 3:
        return interleave_channels<3>(from, to, count);
      case 4:
        return interleave_channels<4>(from, to, count);
      default:
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t i = 0; i < count; ++i) {
            to[i * channels + c] = cast(from[c * stride_c + i]);
          }
        }
    }
  }

  template <int kChannels>
  SSLDIFF_INLINE void interleave_channels(const From* __restrict from, To* __restrict to,
                                          int64_t count) const {
    To block[kChannels][kBlock];
    for (int64_t first = 0; first < count; first += kBlock) {
      const int64_t length = std::min(kBlock, count - first);
      for (int c = 0; c < kChannels; ++c) {
        copy(from + c * stride_c + first, block[c], length);
      }
      To* __restrict out = to + first * kChannels;
      for (int64_t i = 0; i < length; ++i) {
        for (int c = 0; c < kChannels; ++c) {
          out[i * kChannels + c] = block[c][i];
        }
      }
    }
  }
};

template <typename From, typename To>
void launch(const Tensor& canvas, const Tensor& windows, const GatherPlan& plan, bool interleaved) {
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
                                     interleaved};
  parallel_dispatch(windows.size(0) * plan.window_height, kGrain, body);
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
