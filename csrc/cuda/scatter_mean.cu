// SPDX-License-Identifier: Apache-2.0
// scatter_mean for CUDA; the equation stands in ops/scatter_mean.py.
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
#include <vector>

#include "../checks.h"
#include "../include/window_geometry.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of grid.x

template <typename T, typename Acc>
struct ScatterMean {
  const T* windows;  // [P * Q, C, h, w]
  Acc* canvas;       // [C, H, W], contiguous
  int64_t stride_n, stride_c, stride_y, stride_x;
  int64_t channels, height, width, window_height, window_width;
  int64_t count_y, count_x;
  const int64_t* origins_y;  // [P]
  const int64_t* origins_x;  // [Q]
  const Acc* weight_y;       // [h]
  const Acc* weight_x;       // [w]
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

// One thread gathers one pixel of one channel: neighbours along x read neighbouring elements.
template <typename T, typename Acc>
__global__ void __launch_bounds__(kThreads) scatter_mean_kernel(const ScatterMean<T, Acc> a) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= a.channels * a.height * a.width) {
    return;
  }
  const int64_t x = pixel % a.width;
  const int64_t y = pixel / a.width % a.height;
  const int64_t c = pixel / (a.width * a.height);
  const Range ps = windows_covering(a.origins_y, a.count_y, a.window_height, y, y);
  const Range qs = windows_covering(a.origins_x, a.count_x, a.window_width, x, x);
  Acc sum = 0;
  Acc norm = 0;
  for (int64_t p = ps.begin; p < ps.end; ++p) {
    const int64_t u = y - a.origins_y[p];
    const Acc weight_u = a.weight_y[u];
    const T* row = a.windows + c * a.stride_c + u * a.stride_y;
    for (int64_t q = qs.begin; q < qs.end; ++q) {
      const int64_t v = x - a.origins_x[q];
      const Acc weight = weight_u * a.weight_x[v];
      sum += weight * widen(row[(p * a.count_x + q) * a.stride_n + v * a.stride_x]);
      norm += weight;
    }
  }
  a.canvas[pixel] = sum / norm;
}

// Origins and weights in one copy to the device; pageable memory has been read on return.
template <typename Acc>
Tensor upload(const Tensor& like, const std::vector<int64_t>& origins_y,
              const std::vector<int64_t>& origins_x, const std::vector<double>& weight_y,
              const std::vector<double>& weight_x, cudaStream_t stream) {
  std::vector<int64_t> packed(origins_y);
  packed.insert(packed.end(), origins_x.begin(), origins_x.end());
  std::vector<Acc> weights(weight_y.begin(), weight_y.end());
  weights.insert(weights.end(), weight_x.begin(), weight_x.end());
  const size_t bytes = weights.size() * sizeof(Acc);
  const size_t origins = packed.size();
  packed.resize(origins + (bytes + sizeof(int64_t) - 1) / sizeof(int64_t));
  std::memcpy(packed.data() + origins, weights.data(), bytes);
  Tensor device =
      torch::stable::new_empty(like, {static_cast<int64_t>(packed.size())}, ScalarType::Long);
  STD_CUDA_CHECK(cudaMemcpyAsync(device.mutable_data_ptr(), packed.data(),
                                 packed.size() * sizeof(int64_t), cudaMemcpyHostToDevice, stream));
  return device;
}

template <typename T, typename Acc>
void launch(const Tensor& windows, const Tensor& canvas, const std::vector<int64_t>& origins_y,
            const std::vector<int64_t>& origins_x, const std::vector<double>& weight_y,
            const std::vector<double>& weight_x, cudaStream_t stream) {
  const Tensor plan = upload<Acc>(windows, origins_y, origins_x, weight_y, weight_x, stream);
  const auto* origins = static_cast<const int64_t*>(plan.const_data_ptr());
  const int64_t count_y = static_cast<int64_t>(origins_y.size());
  const int64_t count_x = static_cast<int64_t>(origins_x.size());
  const auto* weights = reinterpret_cast<const Acc*>(origins + count_y + count_x);
  const ScatterMean<T, Acc> arguments{static_cast<const T*>(windows.const_data_ptr()),
                                      static_cast<Acc*>(canvas.mutable_data_ptr()),
                                      windows.stride(0),
                                      windows.stride(1),
                                      windows.stride(2),
                                      windows.stride(3),
                                      canvas.size(0),
                                      canvas.size(1),
                                      canvas.size(2),
                                      windows.size(2),
                                      windows.size(3),
                                      count_y,
                                      count_x,
                                      origins,
                                      origins + count_y,
                                      weights,
                                      weights + windows.size(2)};
  const int64_t blocks = (canvas.numel() + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks <= kMaxBlocks, "scatter_mean: a canvas of ", canvas.numel(),
                  " elements is too large for one launch; the limit is ", kMaxBlocks * kThreads,
                  ".");
  scatter_mean_kernel<T, Acc><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor scatter_mean(Tensor windows, std::vector<int64_t> origins_y, std::vector<int64_t> origins_x,
                    std::vector<double> weight_y, std::vector<double> weight_x, int64_t height,
                    int64_t width) {
  check_lattice(windows, origins_y, origins_x, weight_y, weight_x, height, width);
  const torch::stable::accelerator::DeviceGuard guard(windows.get_device_index());
  const ScalarType type = windows.scalar_type();
  const ScalarType out_type = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor canvas = torch::stable::new_empty(windows, {windows.size(1), height, width}, out_type);
  if (canvas.numel() == 0) {
    return canvas;
  }
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(windows.get_device_index(), &handle));
  const auto stream = static_cast<cudaStream_t>(handle);
  if (type == ScalarType::Double) {
    launch<double, double>(windows, canvas, origins_y, origins_x, weight_y, weight_x, stream);
  } else if (type == ScalarType::BFloat16) {
    launch<__nv_bfloat16, float>(windows, canvas, origins_y, origins_x, weight_y, weight_x, stream);
  } else if (type == ScalarType::Half) {
    launch<__half, float>(windows, canvas, origins_y, origins_x, weight_y, weight_x, stream);
  } else {
    launch<float, float>(windows, canvas, origins_y, origins_x, weight_y, weight_x, stream);
  }
  return canvas;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CUDA, m) { m.impl("scatter_mean", TORCH_BOX(&scatter_mean)); }

}  // namespace
}  // namespace ssldiff
