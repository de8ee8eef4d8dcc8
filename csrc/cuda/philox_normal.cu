// SPDX-License-Identifier: Apache-2.0
// philox_normal and philox4x32 for CUDA; the equations stand in ops/philox_normal.py.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "../include/philox.h"

namespace ssldiff {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of grid.x

// One thread draws one pixel of one channel.
__global__ void __launch_bounds__(kThreads)
    philox_normal_kernel(float* out,  // [C, rows, W], contiguous
                         int64_t count, int64_t rows, int64_t width, uint64_t seed,
                         int64_t first_row, int64_t step) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= count) {
    return;
  }
  const int64_t line = pixel / width;
  out[pixel] =
      philox_normal_at(seed, line / rows, first_row + line % rows, pixel - line * width, step);
}

__global__ void __launch_bounds__(kThreads) philox4x32_kernel(const int64_t* counters,  // [N, 4]
                                                              int64_t* words,           // [N, 4]
                                                              int64_t count, uint64_t seed) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= count) {
    return;
  }
  const int64_t* c = counters + 4 * n;
  const PhiloxWords drawn = philox4x32({static_cast<uint32_t>(c[0]), static_cast<uint32_t>(c[1]),
                                        static_cast<uint32_t>(c[2]), static_cast<uint32_t>(c[3])},
                                       seed);
  int64_t* w = words + 4 * n;
  w[0] = drawn.w0;
  w[1] = drawn.w1;
  w[2] = drawn.w2;
  w[3] = drawn.w3;
}

unsigned blocks_for(int64_t count, const char* call) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks <= kMaxBlocks, call, ": ", count,
                  " elements are too many for one launch; the limit is ", kMaxBlocks * kThreads,
                  ".");
  return static_cast<unsigned>(blocks);
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle));
  return static_cast<cudaStream_t>(handle);
}

void philox_normal(Tensor out, int64_t seed, int64_t first_row, int64_t step) {
  check_noise(out, first_row, step);
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  if (out.numel() == 0) {
    return;
  }
  philox_normal_kernel<<<blocks_for(out.numel(), "philox_normal"), kThreads, 0,
                         current_stream(out)>>>(static_cast<float*>(out.mutable_data_ptr()),
                                                out.numel(), out.size(1), out.size(2),
                                                static_cast<uint64_t>(seed), first_row, step);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor philox_words(Tensor counters, int64_t seed) {
  check_counters(counters);
  const torch::stable::accelerator::DeviceGuard guard(counters.get_device_index());
  counters = torch::stable::contiguous(counters);
  Tensor words = torch::stable::new_empty(counters, {counters.size(0), 4});
  if (words.numel() == 0) {
    return words;
  }
  philox4x32_kernel<<<blocks_for(counters.size(0), "philox4x32"), kThreads, 0,
                      current_stream(counters)>>>(
      static_cast<const int64_t*>(counters.const_data_ptr()),
      static_cast<int64_t*>(words.mutable_data_ptr()), counters.size(0),
      static_cast<uint64_t>(seed));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return words;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CUDA, m) {
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
  m.impl("philox4x32", TORCH_BOX(&philox_words));
}

}  // namespace
}  // namespace ssldiff
