// SPDX-License-Identifier: Apache-2.0
// Checks of the operators that take windows. The Python functions say the same in friendlier words
// first; these guard whoever calls torch.ops.ssldiff directly, so that nothing reads outside its
// memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "include/window_lattice.h"

namespace ssldiff {

// What the operators are told of the canvas, in the order of the schema's `geometry`.
struct WindowGeometry {
  int64_t height, width;
  bool wrap_y, wrap_x;
  Range rows;  // of the canvas, that are made
};

inline bool is_real(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

inline torch::headeronly::ScalarType accumulator_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_window_axis(const char* call, const char* name,
                              const std::vector<int64_t>& origins, int64_t window, int64_t size,
                              bool wraps) {
  int64_t previous = -1;
  for (const int64_t origin : origins) {
    STD_TORCH_CHECK(origin > previous && origin <= (wraps ? size - 1 : size - window), call,
                    ": origins_", name,
                    " must ascend from 0 and keep every window on the canvas, but one of them is ",
                    origin, ".");
    previous = origin;
  }
  STD_TORCH_CHECK(window > 0 && window <= size && !origins.empty(), call,
                  ": there must be windows along ", name, " from 1 to the size of the canvas, but ",
                  origins.size(), " of ", window, " were given for ", size, ".");
}

// The numbers of windows, which lie on the host whatever the device of the rest.
inline const int64_t* check_window_index(const char* call, const torch::stable::Tensor& index,
                                         int64_t windows) {
  STD_TORCH_CHECK(index.scalar_type() == torch::headeronly::ScalarType::Long && index.dim() == 1 &&
                      index.is_contiguous() && index.is_cpu(),
                  call, ": index must be a contiguous int64 tensor [N] on the CPU.");
  const int64_t* numbers = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < index.numel(); ++i) {
    STD_TORCH_CHECK(numbers[i] >= 0 && numbers[i] < windows, call, ": index holds ", numbers[i],
                    ", but the plan has ", windows, " windows.");
  }
  return numbers;
}

// The numbers of the windows given; null: all of them. (No windows at all have no address.)
inline const int64_t* numbers_or_null(const std::optional<torch::stable::Tensor>& index) {
  static const int64_t none = 0;
  if (!index.has_value()) {
    return nullptr;
  }
  return index->numel() == 0 ? &none : static_cast<const int64_t*>(index->const_data_ptr());
}

// A tensor that lies beside the windows, with their accumulator's dtype.
inline void check_beside(const char* name, const torch::stable::Tensor& tensor,
                         const torch::stable::Tensor& windows) {
  STD_TORCH_CHECK(tensor.scalar_type() == accumulator_of(windows.scalar_type()) &&
                      tensor.device() == windows.device(),
                  "scatter_mean: ", name,
                  " must be float32 (float64 with float64 windows) on the device of windows.");
}

inline void check_band(const char* name, const torch::stable::Tensor& tensor,
                       const torch::stable::Tensor& windows, const WindowGeometry& geometry) {
  check_beside(name, tensor, windows);
  const int64_t rows = geometry.rows.end - geometry.rows.begin;
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == windows.size(1) &&
                      tensor.size(1) == rows && tensor.size(2) == geometry.width,
                  "scatter_mean: ", name, " must be [C, rows, W], that is [", windows.size(1), ", ",
                  rows, ", ", geometry.width, "].");
}

inline WindowGeometry window_geometry(const std::vector<int64_t>& values) {
  STD_TORCH_CHECK(values.size() == 6,
                  "scatter_mean: geometry must be height, width, wrap_y, wrap_x, first row and end "
                  "of rows.");
  const WindowGeometry made{values[0], values[1], values[2] != 0, values[3] != 0,
                            Range{values[4], values[5]}};
  STD_TORCH_CHECK(
      0 <= made.rows.begin && made.rows.begin <= made.rows.end && made.rows.end <= made.height,
      "scatter_mean: rows must lie between 0 and ", made.height, ", but are ", made.rows.begin,
      " to ", made.rows.end, ".");
  return made;
}

// All arguments but those of the step.
inline WindowGeometry check_scatter(
    const torch::stable::Tensor& windows, const std::optional<torch::stable::Tensor>& index,
    const std::optional<torch::stable::Tensor>& uncond,
    const std::optional<torch::stable::Tensor>& scale,
    const std::optional<torch::stable::Tensor>& background, const std::vector<int64_t>& origins_y,
    const std::vector<int64_t>& origins_x, const std::vector<double>& weight_y,
    const std::vector<double>& weight_x, const std::vector<int64_t>& values) {
  const char* call = "scatter_mean";
  const WindowGeometry geometry = window_geometry(values);
  STD_TORCH_CHECK(is_real(windows.scalar_type()),
                  "scatter_mean: windows must be float32, bfloat16, float16 or float64.");
  STD_TORCH_CHECK(windows.dim() == 4, "scatter_mean: windows must have 4 dimensions, but has ",
                  windows.dim(), ".");
  const int64_t h = windows.size(2);
  const int64_t w = windows.size(3);
  check_window_axis(call, "y", origins_y, h, geometry.height, geometry.wrap_y);
  check_window_axis(call, "x", origins_x, w, geometry.width, geometry.wrap_x);
  STD_TORCH_CHECK(
      static_cast<int64_t>(weight_y.size()) == h && static_cast<int64_t>(weight_x.size()) == w,
      "scatter_mean: weight_y and weight_x must have ", h, " and ", w, " entries, but have ",
      weight_y.size(), " and ", weight_x.size(), ".");
  const int64_t count = static_cast<int64_t>(origins_y.size() * origins_x.size());
  const int64_t given = index.has_value() ? index->numel() : count;
  STD_TORCH_CHECK(windows.size(0) == given, "scatter_mean: windows holds ", windows.size(0),
                  " windows, but ", given, " were expected.");
  if (index.has_value()) {
    const int64_t* numbers = check_window_index(call, *index, count);
    for (int64_t i = 1; i < given; ++i) {
      STD_TORCH_CHECK(numbers[i - 1] < numbers[i], "scatter_mean: index must ascend, but holds ",
                      numbers[i], " after ", numbers[i - 1], ".");
    }
  }
  if (uncond.has_value()) {
    STD_TORCH_CHECK(uncond->scalar_type() == windows.scalar_type() &&
                        uncond->device() == windows.device() &&
                        uncond->sizes().equals(windows.sizes()),
                    "scatter_mean: uncond must have the shape, dtype and device of windows.");
  }
  if (scale.has_value()) {
    check_beside("scale", *scale, windows);
    const bool of_windows = scale->dim() == 1 && scale->size(0) == given;
    const bool of_pixels = scale->dim() == 2 && scale->size(1) == geometry.width &&
                           scale->size(0) == geometry.rows.end - geometry.rows.begin;
    STD_TORCH_CHECK(uncond.has_value() && (of_windows || of_pixels),
                    "scatter_mean: scale must be [M] or [rows, W], beside uncond.");
  }
  if (background.has_value()) {
    check_band("background", *background, windows, geometry);
  }
  return geometry;
}

constexpr size_t kStepCoefficients = 6;  // x, output, noise, history, denoised x, denoised output

inline void check_step(const torch::stable::Tensor& windows, const torch::stable::Tensor& canvas,
                       const std::optional<torch::stable::Tensor>& previous,
                       const std::vector<double>& coefficients, const WindowGeometry& geometry,
                       int64_t step) {
  constexpr int64_t kLimit = int64_t{1} << 32;
  check_band("canvas", canvas, windows, geometry);
  STD_TORCH_CHECK(coefficients.size() == kStepCoefficients,
                  "scatter_mean: coefficients must be x, output, noise, history, denoised x and "
                  "denoised output.");
  if (previous.has_value()) {
    check_band("previous", *previous, windows, geometry);
  }
  STD_TORCH_CHECK(previous.has_value() || coefficients[3] == 0.0,
                  "scatter_mean: previous must be given where the history has a coefficient.");
  STD_TORCH_CHECK(step >= 0 && step < kLimit && geometry.height <= kLimit &&
                      geometry.width <= kLimit && canvas.size(0) <= kLimit,
                  "scatter_mean: coordinates and steps count from 0 and end at 2^32, but the step "
                  "is ",
                  step, ".");
}

// Where each window to gather lies in the canvas rows that were given.
struct GatherPlan {
  int64_t window_height, window_width;
  int64_t period;  // rows after which a window goes on at the canvas's first row
  std::vector<int64_t> first_rows, origins_x;
};

inline GatherPlan check_gather(const torch::stable::Tensor& canvas,
                               const torch::stable::Tensor& index,
                               const std::vector<int64_t>& origins_y,
                               const std::vector<int64_t>& origins_x,
                               const std::vector<int64_t>& geometry,
                               torch::headeronly::ScalarType dtype) {
  const char* call = "gather_windows";
  STD_TORCH_CHECK(geometry.size() == 7,
                  "gather_windows: geometry must be height, width, wrap_y, wrap_x, the window's "
                  "height and width and the first row.");
  const int64_t height = geometry[0];
  const int64_t width = geometry[1];
  STD_TORCH_CHECK(is_real(canvas.scalar_type()) && is_real(dtype),
                  "gather_windows: canvas and dtype must be float32, bfloat16, float16 or "
                  "float64.");
  STD_TORCH_CHECK(canvas.dim() == 3 && canvas.size(2) == width,
                  "gather_windows: canvas must be [C, rows, ", width, "].");
  check_window_axis(call, "y", origins_y, geometry[4], height, geometry[2] != 0);
  check_window_axis(call, "x", origins_x, geometry[5], width, geometry[3] != 0);
  const int64_t columns = static_cast<int64_t>(origins_x.size());
  const int64_t* numbers =
      check_window_index(call, index, columns * static_cast<int64_t>(origins_y.size()));
  GatherPlan plan{geometry[4], geometry[5], height, {}, {}};
  for (int64_t i = 0; i < index.numel(); ++i) {
    int64_t first = origins_y[numbers[i] / columns] - geometry[6];
    if (geometry[2] != 0) {
      first = (first % height + height) % height;
    }
    // Of a window that runs over the end of the canvas every row must be there.
    const bool whole = canvas.size(1) == height && geometry[2] != 0;
    STD_TORCH_CHECK(first >= 0 && (whole || first + plan.window_height <= canvas.size(1)),
                    "gather_windows: window ", numbers[i], " needs canvas rows ",
                    origins_y[numbers[i] / columns], " to ",
                    origins_y[numbers[i] / columns] + plan.window_height, ", but ", geometry[6],
                    " to ", geometry[6] + canvas.size(1), " were given.");
    plan.first_rows.push_back(first);
    plan.origins_x.push_back(origins_x[numbers[i] % columns]);
  }
  return plan;
}

// [N, h, w, C] seen as [N, C, h, w].
inline torch::stable::Tensor channels_first(const torch::stable::Tensor& windows) {
  return torch::stable::transpose(torch::stable::transpose(windows, 2, 3), 1, 2);
}

}  // namespace ssldiff
