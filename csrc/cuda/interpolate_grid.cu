// SPDX-License-Identifier: Apache-2.0
// interpolate_grid for CUDA; the equations stand in ops/interpolate_grid.py.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../checks.h"
#include "../include/grid_geometry.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of grid.x

template <typename T>
struct InterpolateGrid {
  const T* grid;         // [R, K, T, D], contiguous
  const double* points;  // [N, 2], contiguous
  const bool* valid;     // [R, K], or none
  T* out;                // [N, T, D], contiguous
  int64_t rows, columns, tokens, width;
};

// The products of a token's four corners, summed over the block in a fixed order; the result is
// thread 0's.
template <typename T>
__device__ void multiply(const T* const (&cells)[4], int64_t width,
                         double (&products)[kGridProducts]) {
  __shared__ double partial[kGridProducts][kThreads / kWarp];
  for (int i = 0; i < kGridProducts; ++i) {
    products[i] = 0;
  }
  for (int64_t d = threadIdx.x; d < width; d += kThreads) {
    double v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = static_cast<double>(cells[i][d]);
    }
    int product = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = i; j < 4; ++j) {
        products[product++] += v[i] * v[j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kGridProducts; ++i) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      products[i] += __shfl_down_sync(0xffffffffu, products[i], distance);
    }
    if (threadIdx.x % kWarp == 0) {
      partial[i][threadIdx.x / kWarp] = products[i];
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kGridProducts; ++i) {
      products[i] = partial[i][0];
#pragma unroll
      for (int warp = 1; warp < kThreads / kWarp; ++warp) {
        products[i] += partial[i][warp];
      }
    }
  }
}

// One block interpolates one token of one point.
template <typename T, GridMode kMode>
__global__ void __launch_bounds__(kThreads) interpolate_grid_kernel(const InterpolateGrid<T> a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) / a.tokens;
  const int64_t t = static_cast<int64_t>(blockIdx.x) % a.tokens;
  const GridCorners<T> corners = grid_corners<T>(a.points + 2 * n, a.rows, a.columns, a.valid);
  const T* cells[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    cells[i] = a.grid + (corners.cells[i] * a.tokens + t) * a.width;
  }
  GridWeights<T> weights;
  if constexpr (kMode == GridMode::kSlerp) {
    __shared__ GridWeights<T> shared;
    double products[kGridProducts];
    multiply(cells, a.width, products);
    if (threadIdx.x == 0) {
      shared = slerp_weights(corners, products);
    }
    __syncthreads();
    weights = shared;
  } else if constexpr (kMode == GridMode::kNearest) {
    weights = nearest_weights(corners);
  } else {
    weights = bilinear_weights(corners);
  }
  T* out = a.out + static_cast<int64_t>(blockIdx.x) * a.width;
  for (int64_t d = threadIdx.x; d < a.width; d += kThreads) {
    T sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // A cell of weight zero may hold NaN.
      sum += weights.w[i] != 0 ? weights.w[i] * cells[i][d] : T(0);
    }
    out[d] = sum;
  }
}

template <typename T>
void launch(const Tensor& grid, const Tensor& points, const std::optional<Tensor>& valid,
            const Tensor& out, GridMode mode, cudaStream_t stream) {
  const InterpolateGrid<T> arguments{
      static_cast<const T*>(grid.const_data_ptr()),
      static_cast<const double*>(points.const_data_ptr()),
      valid.has_value() ? static_cast<const bool*>(valid->const_data_ptr()) : nullptr,
      static_cast<T*>(out.mutable_data_ptr()),
      grid.size(0),
      grid.size(1),
      grid.size(2),
      grid.size(3)};
  const int64_t count = points.size(0) * grid.size(2);
  STD_TORCH_CHECK(count <= kMaxBlocks, "interpolate_grid: ", count,
                  " tokens are too many for one launch; the limit is ", kMaxBlocks, ".");
  const auto blocks = static_cast<unsigned>(count);
  switch (mode) {
    case GridMode::kBilinear:
      interpolate_grid_kernel<T, GridMode::kBilinear><<<blocks, kThreads, 0, stream>>>(arguments);
      break;
    case GridMode::kSlerp:
      interpolate_grid_kernel<T, GridMode::kSlerp><<<blocks, kThreads, 0, stream>>>(arguments);
      break;
    case GridMode::kNearest:
      interpolate_grid_kernel<T, GridMode::kNearest><<<blocks, kThreads, 0, stream>>>(arguments);
      break;
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor interpolate_grid(Tensor grid, Tensor points, std::optional<Tensor> valid,
                        std::string mode_name) {
  const GridMode mode = check_grid(grid, points, valid, mode_name);
  const torch::stable::accelerator::DeviceGuard guard(grid.get_device_index());
  grid = torch::stable::contiguous(grid);
  points = torch::stable::contiguous(points);
  if (valid.has_value()) {
    valid = torch::stable::contiguous(*valid);
  }
  Tensor out = torch::stable::new_empty(grid, {points.size(0), grid.size(2), grid.size(3)});
  if (out.numel() == 0) {
    return out;
  }
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(grid.get_device_index(), &handle));
  const auto stream = static_cast<cudaStream_t>(handle);
  if (grid.scalar_type() == ScalarType::Double) {
    launch<double>(grid, points, valid, out, mode, stream);
  } else {
    launch<float>(grid, points, valid, out, mode, stream);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CUDA, m) {
  m.impl("interpolate_grid", TORCH_BOX(&interpolate_grid));
}

}  // namespace
}  // namespace ssldiff
