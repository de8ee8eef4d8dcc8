// SPDX-License-Identifier: Apache-2.0
// token_attention for CUDA; the equations stand in ops/token_attention.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "../checks.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32;
constexpr int kMaxWarps = 4;  // of a block, each with a row of its own
constexpr int kMaxThreads = kMaxWarps * kWarp;
constexpr int kBlocks = 8;  // of a multiprocessor: 64 registers for each thread
constexpr int kMinBlocks =
    6;  // of a multiprocessor: fewer than 86 registers a thread, none spilled
constexpr int64_t kSharedBytes = 48 * 1024;             // that every GPU gives without asking
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of grid.x
constexpr int kVector = 4;                              // elements loaded at a time

template <typename Acc, typename T>
__device__ __forceinline__ Acc widen(T value) {
  return static_cast<Acc>(value);
}

template <typename T, typename Acc>
__device__ __forceinline__ T narrow(Acc value) {
  return static_cast<T>(value);
}

template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float value) {
  return __float2bfloat16_rn(value);
}

template <>
__device__ __forceinline__ __half narrow<__half, float>(float value) {
  return __float2half_rn(value);
}

// kCount elements that move in one instruction.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T v[kCount];
};

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}

template <typename T, typename Acc>
struct TokenAttention {
  const T* x;  // [N, L, C], each row contiguous
  int64_t stride_n, stride_l;
  const Acc* values;   // [N, S, C], contiguous
  const Acc* keys;     // [N, S, C], contiguous, or none for one token
  const Acc* offsets;  // [N, S], contiguous
  const void* weight;  // [C], of T or, where narrow_norm is false, of Acc
  const void* bias;
  T* y;  // [N, L, C], contiguous
  T* z;
  int64_t rows, length;
  int width, heads, vectors;  // S = vectors
  Acc eps;
  bool narrow_norm;
};

// Every lane gets the sum over the warp, made in the same order.
template <typename Acc>
__device__ __forceinline__ Acc warp_sum(Acc value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

template <typename Acc>
__device__ __forceinline__ Acc reciprocal_root(Acc value) {
  return Acc(1) / sqrt(value);
}

// Subtracts the mean from a lane's own elements of the row; returns 1 / deviation.
template <int kCount, typename Acc>
__device__ __forceinline__ Acc centre(Acc* row, Acc total, int width, Acc eps) {
  const Acc mean = warp_sum(total) / static_cast<Acc>(width);
  Acc squares = 0;
  for (int d = threadIdx.x % kWarp * kCount; d < width; d += kWarp * kCount) {
    Pack<Acc, kCount> pack = load<Acc, kCount>(row + d);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      pack.v[i] -= mean;
      squares += pack.v[i] * pack.v[i];
    }
    *reinterpret_cast<Pack<Acc, kCount>*>(row + d) = pack;
  }
  return reciprocal_root(warp_sum(squares) / static_cast<Acc>(width) + eps);
}

// The logits of all heads and tokens to shares, head by head.
template <typename Acc>
__device__ __forceinline__ void softmax(Acc* shares, int heads, int tokens) {
  __syncwarp();
  for (int head = threadIdx.x % kWarp; head < heads; head += kWarp) {
    Acc* share = shares + head * tokens;
    Acc largest = share[0];
    for (int t = 1; t < tokens; ++t) {
      largest = share[t] > largest ? share[t] : largest;
    }
    Acc total = 0;
    for (int t = 0; t < tokens; ++t) {
      share[t] = exp(share[t] - largest);
      total += share[t];
    }
    for (int t = 0; t < tokens; ++t) {
      share[t] /= total;
    }
  }
  __syncwarp();
}

template <typename T, typename Acc>
__device__ __forceinline__ Acc norm_parameter(const void* from, int d, bool is_narrow) {
  return is_narrow ? widen<Acc>(static_cast<const T*>(from)[d]) : static_cast<const Acc*>(from)[d];
}

// One warp makes one row. Its lanes keep their elements in shared memory, where each reads only
// what it wrote itself.
template <typename T, typename Acc, int kCount, bool kKeys>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    token_attention_kernel(const TokenAttention<T, Acc> a) {
  extern __shared__ __align__(32) unsigned char memory[];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int pitch = (a.width + kVector - 1) / kVector * kVector;
  Acc* row = reinterpret_cast<Acc*>(memory) + warp * pitch;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (r >= a.rows) {
    return;
  }
  const int64_t n = r / a.length;
  const T* source = a.x + n * a.stride_n + r % a.length * a.stride_l;
  const Acc* values = a.values + n * a.vectors * a.width;
  T* y = a.y + r * a.width;
  T* z = a.z + r * a.width;
  Acc* shares = nullptr;
  if constexpr (kKeys) {
    shares = reinterpret_cast<Acc*>(memory) + blockDim.x / kWarp * pitch + warp * a.vectors;
    Acc total = 0;
    for (int d = lane * kCount; d < a.width; d += kWarp * kCount) {
      const Pack<T, kCount> in = load<T, kCount>(source + d);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        row[d + i] = widen<Acc>(in.v[i]);
        total += row[d + i];
      }
    }
    const Acc scale = centre<kCount>(row, total, a.width, a.eps);
    const Acc* keys = a.keys + n * a.vectors * a.width;
#pragma unroll 1
    for (int s = 0; s < a.vectors; ++s) {
      Acc product = 0;
      for (int d = lane * kCount; d < a.width; d += kWarp * kCount) {
        const Pack<Acc, kCount> key =
            load<Acc, kCount>(keys + static_cast<int64_t>(s) * a.width + d);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          product += row[d + i] * key.v[i];
        }
      }
      product = warp_sum(product);
      if (lane == 0) {
        shares[s] = product * scale + a.offsets[n * a.vectors + s];
      }
    }
    softmax(shares, a.heads, a.vectors / a.heads);
  }
  Acc total = 0;
  for (int d = lane * kCount; d < a.width; d += kWarp * kCount) {
    // With keys the row is in shared memory less its mean; x comes from the cache again.
    const Pack<T, kCount> in = load<T, kCount>(source + d);
    Pack<Acc, kCount> sum;
    Pack<T, kCount> out;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sum.v[i] = widen<Acc>(in.v[i]);
    }
#pragma unroll 1
    for (int s = 0; s < (kKeys ? a.vectors : 1); ++s) {
      const Pack<Acc, kCount> value =
          load<Acc, kCount>(values + static_cast<int64_t>(s) * a.width + d);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sum.v[i] += kKeys ? shares[s] * value.v[i] : value.v[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      out.v[i] = narrow<T>(sum.v[i]);
      total += sum.v[i];
    }
    *reinterpret_cast<Pack<T, kCount>*>(y + d) = out;
    *reinterpret_cast<Pack<Acc, kCount>*>(row + d) = sum;
  }
  const Acc scale = centre<kCount>(row, total, a.width, a.eps);
  for (int d = lane * kCount; d < a.width; d += kWarp * kCount) {
    Pack<T, kCount> out;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Acc weight = norm_parameter<T, Acc>(a.weight, d + i, a.narrow_norm);
      const Acc bias = norm_parameter<T, Acc>(a.bias, d + i, a.narrow_norm);
      out.v[i] = narrow<T>(row[d + i] * scale * weight + bias);
    }
    *reinterpret_cast<Pack<T, kCount>*>(z + d) = out;
  }
}

bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <typename T, typename Acc>
void launch(const Tensor& x, const Tensor& values, const Tensor& norm_weight,
            const Tensor& norm_bias, const std::optional<Tensor>& keys,
            const std::optional<Tensor>& offsets, int64_t heads, double eps, const Tensor& y,
            const Tensor& z, cudaStream_t stream) {
  const bool has_keys = keys.has_value();
  const int64_t width = x.size(2), vectors = has_keys ? keys->size(1) : 1;
  const int64_t pitch = (width + kVector - 1) / kVector * kVector;
  const int64_t row_bytes = (pitch + (has_keys ? vectors : 0)) * static_cast<int64_t>(sizeof(Acc));
  STD_TORCH_CHECK(row_bytes <= kSharedBytes, "token_attention: a width of ", width, " with ",
                  vectors, " vectors takes ", row_bytes, " bytes of shared memory, but ",
                  kSharedBytes, " are the limit on a GPU.");
  int64_t warps = kMaxWarps;
  while (warps * row_bytes > kSharedBytes) {
    warps /= 2;
  }
  const TokenAttention<T, Acc> arguments{
      static_cast<const T*>(x.const_data_ptr()),
      x.stride(0),
      x.stride(1),
      static_cast<const Acc*>(values.const_data_ptr()),
      has_keys ? static_cast<const Acc*>(keys->const_data_ptr()) : nullptr,
      has_keys ? static_cast<const Acc*>(offsets->const_data_ptr()) : nullptr,
      norm_weight.const_data_ptr(),
      norm_bias.const_data_ptr(),
      static_cast<T*>(y.mutable_data_ptr()),
      static_cast<T*>(z.mutable_data_ptr()),
      x.size(0) * x.size(1),
      x.size(1),
      static_cast<int>(width),
      static_cast<int>(heads),
      static_cast<int>(vectors),
      static_cast<Acc>(eps),
      norm_weight.scalar_type() == x.scalar_type()};
  const int64_t blocks = (arguments.rows + warps - 1) / warps;
  STD_TORCH_CHECK(blocks <= kMaxBlocks, "token_attention: ", arguments.rows,
                  " positions are too many for one launch; the limit is ", warps * kMaxBlocks, ".");
  constexpr int64_t kPackBytes = kVector * sizeof(Acc);
  const bool packed = width % kVector == 0 && x.stride(0) % kVector == 0 &&
                      x.stride(1) % kVector == 0 && is_aligned(arguments.x, kVector * sizeof(T)) &&
                      is_aligned(arguments.values, kPackBytes) &&
                      is_aligned(arguments.keys, kPackBytes);
  const auto kernel = has_keys ? packed ? token_attention_kernel<T, Acc, kVector, true>
                                        : token_attention_kernel<T, Acc, 1, true>
                      : packed ? token_attention_kernel<T, Acc, kVector, false>
                               : token_attention_kernel<T, Acc, 1, false>;
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarp),
           static_cast<size_t>(warps * row_bytes), stream>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> token_attention(Tensor x, Tensor values, Tensor norm_weight,
                                           Tensor norm_bias, std::optional<Tensor> keys,
                                           std::optional<Tensor> offsets, int64_t heads,
                                           double eps) {
  check_tokens(x, values, norm_weight, norm_bias, keys, offsets, heads, eps);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (x.stride(2) != 1) {
    x = torch::stable::contiguous(x);
  }
  values = torch::stable::contiguous(values);
  norm_weight = torch::stable::contiguous(norm_weight);
  norm_bias = torch::stable::contiguous(norm_bias);
  if (keys.has_value()) {
    keys = torch::stable::contiguous(*keys);
    offsets = torch::stable::contiguous(*offsets);
  }
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  Tensor z = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  if (y.numel() == 0) {
    return {y, z};
  }
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &handle));
  const ScalarType type = x.scalar_type();
  const auto run = type == ScalarType::Double     ? launch<double, double>
                   : type == ScalarType::BFloat16 ? launch<__nv_bfloat16, float>
                   : type == ScalarType::Half     ? launch<__half, float>
                                                  : launch<float, float>;
  run(x, values, norm_weight, norm_bias, keys, offsets, heads, eps, y, z,
      static_cast<cudaStream_t>(handle));
  return {y, z};
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CUDA, m) {
  m.impl("token_attention", TORCH_BOX(&token_attention));
}

}  // namespace
}  // namespace ssldiff
