// SPDX-License-Identifier: Apache-2.0
// scatter_mean and scatter_mean_step for the CPU; the equations stand in ops/scatter_mean.py.
#include "scatter_mean.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../window_checks.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The arguments of the schemas that both operators share.
struct Arguments {
  Tensor windows;
  const std::optional<Tensor>& index;
  std::optional<Tensor> uncond, scale, background;
  const std::vector<int64_t>& origins_y;
  const std::vector<int64_t>& origins_x;
  const std::vector<double>& weight_y;
  const std::vector<double>& weight_x;
  double guidance_scale;
  bool normalise;
};

// And those of the step.
struct Step {
  Tensor canvas;
  std::optional<Tensor> previous;
  const std::vector<double>& coefficients;
  std::optional<Tensor> denoised;  // where it is stored
  int64_t seed, step;
};

template <typename Acc>
const Acc* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const Acc*>(tensor->const_data_ptr()) : nullptr;
}

int64_t columns_of_tile(int64_t rows, int64_t planes, int64_t width, int64_t lanes) {
  int64_t columns = std::min(width, std::max(kTileColumns / lanes, kMinTileColumns));
  // A narrow band is cut into more tiles, so that every thread has some.
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t others = (rows + kTileRows - 1) / kTileRows * planes;
  while (columns >= 2 * kMinTileColumns && others * ((width + columns - 1) / columns) < wanted) {
    columns /= 2;
  }
  return columns;
}

template <typename T, typename Acc, Guidance kGuidance>
void launch(const Arguments& a, const Acc* scale, const Canvas<Acc>& to) {
  const Tensor& windows = a.windows;
  const int64_t channels = windows.size(1);
  const bool interleaved = windows.stride(3) != 1;
  const int64_t lanes = interleaved ? channels : 1;
  const int64_t planes = interleaved ? 1 : channels;
  const int64_t columns = columns_of_tile(to.height, planes, to.width, lanes);
  const ScatterMean<T, Acc, kGuidance> body{static_cast<const T*>(windows.const_data_ptr()),
                                            data_or_null<T>(a.uncond),
                                            scale,
                                            windows.stride(0),
                                            windows.stride(1),
                                            windows.stride(2),
                                            windows.size(2),
                                            windows.size(3),
                                            lanes,
                                            planes,
                                            columns,
                                            (to.height + kTileRows - 1) / kTileRows,
                                            (to.width + columns - 1) / columns,
                                            to};
  parallel_dispatch(body.tiles_y * planes * body.tiles_x, 1, body);
}

template <typename T, typename Acc>
void run(const Arguments& a, const WindowGeometry& geometry, const Tensor& out, const Step* step) {
  const Range all_columns{0, geometry.width};
  const AxisWindows rows = axis_windows(
      {a.origins_y, a.windows.size(2), geometry.height, geometry.wrap_y}, geometry.rows);
  const AxisWindows columns =
      axis_windows({a.origins_x, a.windows.size(3), geometry.width, geometry.wrap_x}, all_columns);
  const auto slots = window_slots(rows, columns, static_cast<int64_t>(a.origins_x.size()),
                                  numbers_or_null(a.index), a.windows.size(0));
  std::vector<uint8_t> whole;
  for (auto row = slots.begin(); row < slots.end(); row += columns.count()) {
    whole.push_back(std::find(row, row + columns.count(), -1) == row + columns.count());
  }
  const std::vector<Acc> weight_y(a.weight_y.begin(), a.weight_y.end());
  const std::vector<Acc> weight_x(a.weight_x.begin(), a.weight_x.end());
  const int64_t lanes = a.windows.stride(3) == 1 ? 1 : a.windows.size(1);
  std::vector<Acc> lane_weight;
  for (const Acc weight : weight_x) {
    lane_weight.insert(lane_weight.end(), lanes, weight);
  }
  const auto norm_y = axis_norm(rows, weight_y, geometry.rows);
  const auto norm_x = axis_norm(columns, weight_x, all_columns);
  std::vector<Acc> coefficients;
  if (step != nullptr) {
    coefficients.assign(step->coefficients.begin(), step->coefficients.end());
  }
  const Canvas<Acc> to{geometry.rows.end - geometry.rows.begin,
                       geometry.width,
                       geometry.rows.begin,
                       static_cast<Acc*>(out.mutable_data_ptr()),
                       rows,
                       columns,
                       slots.data(),
                       whole.data(),
                       weight_y.data(),
                       lane_weight.data(),
                       a.normalise ? norm_y.data() : nullptr,
                       norm_x.data(),
                       data_or_null<Acc>(a.background),
                       step ? static_cast<const Acc*>(step->canvas.const_data_ptr()) : nullptr,
                       step ? data_or_null<Acc>(step->previous) : nullptr,
                       step && step->denoised.has_value()
                           ? static_cast<Acc*>(step->denoised->mutable_data_ptr())
                           : nullptr,
                       coefficients.data(),
                       step ? static_cast<uint64_t>(step->seed) : 0,
                       step ? step->step : 0};
  if (!a.uncond.has_value()) {
    launch<T, Acc, Guidance::kNone>(a, nullptr, to);
  } else if (a.scale.has_value() && a.scale->dim() == 2) {
    launch<T, Acc, Guidance::kOfPixel>(a, data_or_null<Acc>(a.scale), to);
  } else if (a.scale.has_value()) {
    launch<T, Acc, Guidance::kOfWindow>(a, data_or_null<Acc>(a.scale), to);
  } else {
    const std::vector<Acc> scale(a.windows.size(0), static_cast<Acc>(a.guidance_scale));
    launch<T, Acc, Guidance::kOfWindow>(a, scale.data(), to);
  }
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor))
                            : std::nullopt;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  bool same = true;
  for (int64_t i = 0; i < 4; ++i) {
    same = same && a.stride(i) == b.stride(i);
  }
  return same;
}

// Rows of a window, or of all its channels, must be contiguous, and both halves laid out alike.
void lay_out(Arguments& a) {
  const bool planar = a.windows.stride(3) == 1;
  const bool interleaved = a.windows.stride(1) == 1 && a.windows.stride(3) == a.windows.size(1);
  const bool alike = !a.uncond.has_value() || same_strides(a.windows, *a.uncond);
  if (!(planar || interleaved) || !alike) {
    a.windows = torch::stable::contiguous(a.windows);
    a.uncond = contiguous(a.uncond);
  }
  a.scale = contiguous(a.scale);
  a.background = contiguous(a.background);
}

Tensor make(Arguments& a, const WindowGeometry& geometry, const Step* step) {
  lay_out(a);
  const ScalarType type = a.windows.scalar_type();
  Tensor out = torch::stable::new_empty(
      a.windows, {a.windows.size(1), geometry.rows.end - geometry.rows.begin, geometry.width},
      accumulator_of(type));
  if (out.numel() == 0) {
    return out;
  }
  if (type == ScalarType::Double) {
    run<double, double>(a, geometry, out, step);
  } else if (type == ScalarType::BFloat16) {
    run<BFloat16, float>(a, geometry, out, step);
  } else if (type == ScalarType::Half) {
    run<Float16, float>(a, geometry, out, step);
  } else {
    run<float, float>(a, geometry, out, step);
  }
  return out;
}

Tensor scatter_mean(Tensor windows, std::optional<Tensor> index, std::optional<Tensor> uncond,
                    std::optional<Tensor> scale, std::optional<Tensor> background,
                    std::vector<int64_t> origins_y, std::vector<int64_t> origins_x,
                    std::vector<double> weight_y, std::vector<double> weight_x,
                    std::vector<int64_t> geometry, double guidance_scale, bool normalise) {
  const WindowGeometry checked = check_scatter(windows, index, uncond, scale, background, origins_y,
                                               origins_x, weight_y, weight_x, geometry);
  Arguments arguments{windows,   index,    uncond,   scale,          background, origins_y,
                      origins_x, weight_y, weight_x, guidance_scale, normalise};
  return make(arguments, checked, nullptr);
}

std::tuple<Tensor, Tensor> scatter_mean_step(
    Tensor windows, Tensor canvas, std::optional<Tensor> previous, std::optional<Tensor> index,
    std::optional<Tensor> uncond, std::optional<Tensor> scale, std::optional<Tensor> background,
    std::vector<int64_t> origins_y, std::vector<int64_t> origins_x, std::vector<double> weight_y,
    std::vector<double> weight_x, std::vector<int64_t> geometry, double guidance_scale,
    std::vector<double> coefficients, int64_t seed, int64_t step) {
  const WindowGeometry checked = check_scatter(windows, index, uncond, scale, background, origins_y,
                                               origins_x, weight_y, weight_x, geometry);
  check_step(windows, canvas, previous, coefficients, checked, step);
  canvas = torch::stable::contiguous(canvas);
  const bool wanted = coefficients[4] != 0.0 || coefficients[5] != 0.0;
  Tensor denoised = torch::stable::new_empty(
      canvas, {wanted ? canvas.size(0) : 0, canvas.size(1), canvas.size(2)});
  Arguments arguments{windows,   index,    uncond,   scale,          background, origins_y,
                      origins_x, weight_y, weight_x, guidance_scale, true};
  const Step affine{canvas,       contiguous(previous),
                    coefficients, wanted ? std::optional<Tensor>(denoised) : std::nullopt,
                    seed,         step};
  Tensor next = make(arguments, checked, &affine);
  return {next, denoised};
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) {
  m.impl("scatter_mean", TORCH_BOX(&scatter_mean));
  m.impl("scatter_mean_step", TORCH_BOX(&scatter_mean_step));
}

}  // namespace
}  // namespace ssldiff
