// SPDX-License-Identifier: Apache-2.0
// scatter_mean and scatter_mean_step for CUDA; the equations stand in ops/scatter_mean.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../include/philox.h"
#include "../include/window_lattice.h"
#include "../window_checks.h"
#include "kept_uploads.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kMinBlocks = 4;  // on a multiprocessor: 64 registers a thread
// Of a pixel, that one thread gathers: windows and weights are looked up once for all of them.
constexpr int kChannels = 4;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of grid.x

enum class Guidance { kNone, kOfAll, kOfWindow, kOfPixel };

template <typename Acc>
struct AffineStep {
  const Acc* canvas;    // [C, rows, W]; null: the mean is stored
  const Acc* previous;  // [C, rows, W] or null
  Acc* denoised;        // [C, rows, W] or null
  Acc coefficients[kStepCoefficients];
  uint64_t seed;
  int64_t step;
};

template <typename T, typename Acc>
struct ScatterMean {
  const T* windows;       // [M, C, h, w]
  const T* uncond;        // likewise, with the same strides
  const Acc* scale;       // [M] or [rows, W]
  const Acc* background;  // [C, rows, W] or null
  Acc* out;               // [C, rows, W]
  int64_t stride_n, stride_c, stride_y, stride_x;
  int64_t channels, height, width, window_height, window_width, first_row;
  unsigned blocks_x;  // of a row
  int64_t count_y, count_x;
  const int64_t* origins_y;  // [count_y], less first_row
  const int64_t* origins_x;  // [count_x]
  const int64_t* slots;      // [count_y, count_x]; -1: left out
  const Acc* weight_y;       // [h]
  const Acc* weight_x;       // [w]
  Acc guidance_scale;
  bool normalise;
  AffineStep<Acc> step;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

template <typename Acc>
__device__ __forceinline__ Acc apply_step(const AffineStep<Acc>& step, int64_t pixel, int64_t c,
                                          int64_t y, int64_t x, Acc mean) {
  const Acc* k = step.coefficients;
  const Acc canvas = step.canvas[pixel];
  if (step.denoised != nullptr) {
    step.denoised[pixel] = k[4] * canvas + k[5] * mean;
  }
  Acc next = k[0] * canvas + k[1] * mean;
  if (k[3] != 0) {
    next += k[3] * step.previous[pixel];
  }
  if (k[2] != 0) {
    next += k[2] * static_cast<Acc>(philox_normal_at(step.seed, c, y, x, step.step));
  }
  return next;
}

// One thread gathers some channels of one pixel: neighbours along x read neighbouring elements. The
// grid counts the blocks of a row, the rows, and the groups of channels.
template <typename T, typename Acc, Guidance kGuidance>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    scatter_mean_kernel(const ScatterMean<T, Acc> a) {
  const auto height = static_cast<unsigned>(a.height);
  const int64_t x = static_cast<int64_t>(blockIdx.x % a.blocks_x) * kThreads + threadIdx.x;
  const int64_t y = blockIdx.x / a.blocks_x % height;
  const int64_t first = static_cast<int64_t>(blockIdx.x / a.blocks_x / height) * kChannels;
  if (x >= a.width) {
    return;
  }
  const auto channels =
      static_cast<int>(a.channels - first < kChannels ? a.channels - first : kChannels);
  const Range ps = windows_covering(a.origins_y, a.count_y, a.window_height, y, y);
  const Range qs = windows_covering(a.origins_x, a.count_x, a.window_width, x, x);
  Acc scale = a.guidance_scale;
  if (kGuidance == Guidance::kOfPixel) {
    scale = a.scale[y * a.width + x];
  }
  Acc sum[kChannels] = {};
  Acc norm = 0;
  Acc left_out = 0;
  for (int64_t p = ps.begin; p < ps.end; ++p) {
    const int64_t u = y - a.origins_y[p];
    const Acc weight_u = a.weight_y[u];
    const int64_t row = first * a.stride_c + u * a.stride_y;
    for (int64_t q = qs.begin; q < qs.end; ++q) {
      const int64_t v = x - a.origins_x[q];
      const int64_t slot = a.slots[p * a.count_x + q];
      const Acc weight = weight_u * a.weight_x[v];
      if (slot < 0) {
        left_out += weight;
        continue;
      }
      const int64_t at = slot * a.stride_n + row + v * a.stride_x;
      if (kGuidance == Guidance::kOfWindow) {
        scale = a.scale[slot];
      }
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        if (k < channels) {
          Acc value = widen(a.windows[at + k * a.stride_c]);
          if (kGuidance != Guidance::kNone) {
            const Acc base = widen(a.uncond[at + k * a.stride_c]);
            value = base + scale * (value - base);
          }
          sum[k] += weight * value;
        }
      }
      norm += weight;
    }
  }
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    if (k >= channels) {
      return;
    }
    const int64_t c = first + k;
    const int64_t pixel = (c * a.height + y) * a.width + x;
    Acc total = sum[k];
    Acc whole = norm;
    if (a.background != nullptr && left_out > 0) {
      total += left_out * a.background[pixel];
      whole += left_out;
    }
    const Acc mean = a.normalise ? total / whole : total;
    a.out[pixel] =
        a.step.canvas == nullptr ? mean : apply_step(a.step, pixel, c, a.first_row + y, x, mean);
  }
}

// The arguments of the schemas that both operators share.
struct Arguments {
  Tensor windows;
  std::optional<Tensor> index, uncond, scale, background;
  const std::vector<int64_t>& origins_y;
  const std::vector<int64_t>& origins_x;
  const std::vector<double>& weight_y;
  const std::vector<double>& weight_x;
  double guidance_scale;
  bool normalise;
};

struct Step {
  Tensor canvas;
  std::optional<Tensor> previous;
  const std::vector<double>& coefficients;
  std::optional<Tensor> denoised;
  int64_t seed, step;
};

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor))
                            : std::nullopt;
}

template <typename T, typename Acc>
void launch_kernel(const ScatterMean<T, Acc>& a, const Arguments& from, cudaStream_t stream) {
  const int64_t groups = (a.channels + kChannels - 1) / kChannels;
  const int64_t blocks = a.blocks_x * a.height * groups;
  STD_TORCH_CHECK(blocks <= kMaxBlocks, "scatter_mean: a canvas of ", a.channels, " x ", a.height,
                  " x ", a.width, " is too large for one launch; pass fewer rows at a time.");
  const auto grid = static_cast<unsigned>(blocks);
  if (a.uncond == nullptr) {
    scatter_mean_kernel<T, Acc, Guidance::kNone><<<grid, kThreads, 0, stream>>>(a);
  } else if (a.scale == nullptr) {
    scatter_mean_kernel<T, Acc, Guidance::kOfAll><<<grid, kThreads, 0, stream>>>(a);
  } else if (from.scale->dim() == 1) {
    scatter_mean_kernel<T, Acc, Guidance::kOfWindow><<<grid, kThreads, 0, stream>>>(a);
  } else {
    scatter_mean_kernel<T, Acc, Guidance::kOfPixel><<<grid, kThreads, 0, stream>>>(a);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Acc>
AffineStep<Acc> affine_step(const Step* step) {
  AffineStep<Acc> made{};
  if (step != nullptr) {
    made.canvas = static_cast<const Acc*>(step->canvas.const_data_ptr());
    made.previous = data_or_null<Acc>(step->previous);
    if (step->denoised.has_value()) {
      made.denoised = static_cast<Acc*>(step->denoised->mutable_data_ptr());
    }
    std::copy(step->coefficients.begin(), step->coefficients.end(), made.coefficients);
    made.seed = static_cast<uint64_t>(step->seed);
    made.step = step->step;
  }
  return made;
}

template <typename T, typename Acc>
void launch(const Arguments& a, const WindowGeometry& geometry, const Tensor& out, const Step* step,
            cudaStream_t stream) {
  const Tensor& windows = a.windows;
  AxisWindows rows =
      axis_windows({a.origins_y, windows.size(2), geometry.height, geometry.wrap_y}, geometry.rows);
  const AxisWindows columns = axis_windows(
      {a.origins_x, windows.size(3), geometry.width, geometry.wrap_x}, Range{0, geometry.width});
  const auto slots = window_slots(rows, columns, static_cast<int64_t>(a.origins_x.size()),
                                  numbers_or_null(a.index), windows.size(0));
  // All of it in one array: origins and slots, then the bytes of the weights.
  std::vector<int64_t> packed;
  for (const int64_t origin : rows.origins) {
    packed.push_back(origin - geometry.rows.begin);
  }
  packed.insert(packed.end(), columns.origins.begin(), columns.origins.end());
  packed.insert(packed.end(), slots.begin(), slots.end());
  std::vector<Acc> weights(a.weight_y.begin(), a.weight_y.end());
  weights.insert(weights.end(), a.weight_x.begin(), a.weight_x.end());
  const size_t bytes = weights.size() * sizeof(Acc);
  const size_t whole = packed.size();
  packed.resize(whole + (bytes + sizeof(int64_t) - 1) / sizeof(int64_t));
  std::memcpy(packed.data() + whole, weights.data(), bytes);
  const Tensor device = kept_upload(windows, packed, stream);
  const auto* lattice = static_cast<const int64_t*>(device.const_data_ptr());
  const auto* weight = reinterpret_cast<const Acc*>(lattice + whole);
  const ScatterMean<T, Acc> arguments{
      static_cast<const T*>(windows.const_data_ptr()),
      data_or_null<T>(a.uncond),
      data_or_null<Acc>(a.scale),
      data_or_null<Acc>(a.background),
      static_cast<Acc*>(out.mutable_data_ptr()),
      windows.stride(0),
      windows.stride(1),
      windows.stride(2),
      windows.stride(3),
      out.size(0),
      out.size(1),
      out.size(2),
      windows.size(2),
      windows.size(3),
      geometry.rows.begin,
      static_cast<unsigned>((out.size(2) + kThreads - 1) / kThreads),
      rows.count(),
      columns.count(),
      lattice,
      lattice + rows.count(),
      lattice + rows.count() + columns.count(),
      weight,
      weight + windows.size(2),
      static_cast<Acc>(a.guidance_scale),
      a.normalise,
      affine_step<Acc>(step)};
  launch_kernel(arguments, a, stream);
}

bool same_strides(const Tensor& a, const Tensor& b) {
  bool same = true;
  for (int64_t i = 0; i < 4; ++i) {
    same = same && a.stride(i) == b.stride(i);
  }
  return same;
}

Tensor make(Arguments& a, const WindowGeometry& geometry, const Step* step) {
  const ScalarType type = a.windows.scalar_type();
  Tensor out = torch::stable::new_empty(
      a.windows, {a.windows.size(1), geometry.rows.end - geometry.rows.begin, geometry.width},
      accumulator_of(type));
  if (out.numel() == 0) {
    return out;
  }
  if (a.uncond.has_value() && !same_strides(a.windows, *a.uncond)) {
    a.windows = torch::stable::contiguous(a.windows);
    a.uncond = contiguous(a.uncond);
  }
  a.scale = contiguous(a.scale);
  a.background = contiguous(a.background);
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(a.windows.get_device_index(), &handle));
  const auto stream = static_cast<cudaStream_t>(handle);
  if (type == ScalarType::Double) {
    launch<double, double>(a, geometry, out, step, stream);
  } else if (type == ScalarType::BFloat16) {
    launch<__nv_bfloat16, float>(a, geometry, out, step, stream);
  } else if (type == ScalarType::Half) {
    launch<__half, float>(a, geometry, out, step, stream);
  } else {
    launch<float, float>(a, geometry, out, step, stream);
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
  const torch::stable::accelerator::DeviceGuard guard(windows.get_device_index());
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
  const torch::stable::accelerator::DeviceGuard guard(windows.get_device_index());
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

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CUDA, m) {
  m.impl("scatter_mean", TORCH_BOX(&scatter_mean));
  m.impl("scatter_mean_step", TORCH_BOX(&scatter_mean_step));
}

}  // namespace
}  // namespace ssldiff
