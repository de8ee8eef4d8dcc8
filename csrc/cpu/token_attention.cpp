// SPDX-License-Identifier: Apache-2.0
// token_attention for the CPU; the equations stand in ops/token_attention.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../include/half.h"
#include "dispatch.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sums run in this many lanes on every path, so that all give the same bits: two registers of
// AVX-512 in float32, which hides the latency of an addition.
constexpr int64_t kLanes = 32;

// kLanes numbers in registers of kBytes.
template <typename Acc, int kBytes>
struct Lanes {
  typedef Acc Vector __attribute__((vector_size(kBytes)));
  // (GCC copies 32 bytes through the stack when memcpy is inlined before the target is known.)
  typedef Acc Unaligned __attribute__((vector_size(kBytes), aligned(alignof(Acc)), may_alias));
  static constexpr int kPerVector = kBytes / static_cast<int>(sizeof(Acc));
  static constexpr int kVectors = static_cast<int>(kLanes) / kPerVector;
  static_assert(kVectors <= 16, "the loops below are unrolled 16 times at most");
  Vector v[kVectors];

  SSLDIFF_INLINE static Lanes filled(Acc value) {
    Lanes lanes;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      lanes.v[i] = Vector{} + value;
    }
    return lanes;
  }

  SSLDIFF_INLINE static Lanes load(const Acc* from) {
    Lanes lanes;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      lanes.v[i] = *reinterpret_cast<const Unaligned*>(from + i * kPerVector);
    }
    return lanes;
  }

  SSLDIFF_INLINE void store(Acc* to) const {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      *reinterpret_cast<Unaligned*>(to + i * kPerVector) = v[i];
    }
  }

  SSLDIFF_INLINE void add(const Lanes& other) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      v[i] += other.v[i];
    }
  }

  SSLDIFF_INLINE void add_product(const Lanes& a, const Lanes& b) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      v[i] += a.v[i] * b.v[i];
    }
  }

  // By halves: lane i and lane i + 16, then i + 8 and so on.
  SSLDIFF_INLINE Acc sum() const {
    Lanes folded = *this;
#pragma GCC unroll 16
    for (int half = kVectors / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < half; ++i) {
        folded.v[i] += folded.v[i + half];
      }
    }
    Acc lanes[kPerVector];
    *reinterpret_cast<Unaligned*>(lanes) = folded.v[0];
#pragma GCC unroll 16
    for (int half = kPerVector / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < half; ++i) {
        lanes[i] += lanes[i + half];
      }
    }
    return lanes[0];
  }
};

// Rows are padded to whole lanes in the buffers and in the vectors, so that loops have no tail;
// what is added in the padding is zero.
template <typename T, typename Acc>
struct TokenAttention {
  const T* x;  // [N, L, C], each row contiguous
  int64_t stride_n, stride_l;
  const Acc* values;   // [N, S, padded]
  const Acc* keys;     // [N, S, padded], or none for one token
  const Acc* offsets;  // [N, S]
  const Acc* weight;   // [C]
  const Acc* bias;     // [C]
  T* y;                // [N, L, C], contiguous
  T* z;
  int64_t length, width, padded, heads, vectors;  // S = vectors
  Acc eps;

  template <int kBytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, VectorBytes<kBytes>) const {
    std::vector<Acc> buffer(2 * padded + vectors, Acc(0));
    Acc* row = buffer.data();
    Acc* centred = row + padded;
    Acc* shares = centred + padded;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / length;
      const T* source = x + n * stride_n + r % length * stride_l;
      for (int64_t i = 0; i < width; ++i) {
        row[i] = widen(source[i]);
      }
      // (Not once for all: a row with NaN leaves NaN there.)
      std::fill(row + width, row + padded, Acc(0));
      const Acc* value = values + n * vectors * padded;
      if (keys != nullptr) {
        const Acc scale = centre<kBytes>(row, row_sum<kBytes>(row), centred);
        multiply<kBytes>(centred, keys + n * vectors * padded, shares);
        softmax(offsets + n * vectors, scale, shares);
      }
      const Acc total =
          keys != nullptr ? add_shares<kBytes>(value, shares, row) : add_value<kBytes>(value, row);
      const Acc scale = centre<kBytes>(row, total, centred);
      store(row, centred, scale, y + r * width, z + r * width);
    }
  }

  template <int kBytes>
  SSLDIFF_INLINE Acc row_sum(const Acc* row) const {
    auto total = Lanes<Acc, kBytes>::filled(Acc(0));
    for (int64_t i = 0; i < padded; i += kLanes) {
      total.add(Lanes<Acc, kBytes>::load(row + i));
    }
    return total.sum();
  }

  // row - mean, zero in the padding; returns the reciprocal of the deviation.
  template <int kBytes>
  SSLDIFF_INLINE Acc centre(const Acc* row, Acc total, Acc* centred) const {
    using Row = Lanes<Acc, kBytes>;
    const Row minus_mean = Row::filled(-total / static_cast<Acc>(width));
    for (int64_t i = 0; i < padded; i += kLanes) {
      Row value = Row::load(row + i);
      value.add(minus_mean);
      value.store(centred + i);
    }
    std::fill(centred + width, centred + padded, Acc(0));
    Row squares = Row::filled(Acc(0));
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Row value = Row::load(centred + i);
      squares.add_product(value, value);
    }
    return Acc(1) / std::sqrt(squares.sum() / static_cast<Acc>(width) + eps);
  }

  // Two keys at a time share what is loaded of the row.
  template <int kBytes>
  SSLDIFF_INLINE void multiply(const Acc* centred, const Acc* key, Acc* products) const {
    using Row = Lanes<Acc, kBytes>;
    int64_t s = 0;
    for (; s + 1 < vectors; s += 2) {
      Row first = Row::filled(Acc(0)), second = first;
      for (int64_t i = 0; i < padded; i += kLanes) {
        const Row value = Row::load(centred + i);
        first.add_product(value, Row::load(key + s * padded + i));
        second.add_product(value, Row::load(key + (s + 1) * padded + i));
      }
      products[s] = first.sum();
      products[s + 1] = second.sum();
    }
    if (s < vectors) {
      Row only = Row::filled(Acc(0));
      for (int64_t i = 0; i < padded; i += kLanes) {
        only.add_product(Row::load(centred + i), Row::load(key + s * padded + i));
      }
      products[s] = only.sum();
    }
  }

  // Products to shares, head by head.
  SSLDIFF_INLINE void softmax(const Acc* offset, Acc scale, Acc* shares) const {
    const int64_t tokens = vectors / heads;
    for (int64_t first = 0; first < vectors; first += tokens) {
      Acc largest = shares[first] * scale + offset[first];
      for (int64_t s = first; s < first + tokens; ++s) {
        shares[s] = shares[s] * scale + offset[s];
        largest = shares[s] > largest ? shares[s] : largest;
      }
      Acc total = 0;
      for (int64_t s = first; s < first + tokens; ++s) {
        shares[s] = std::exp(shares[s] - largest);
        total += shares[s];
      }
      for (int64_t s = first; s < first + tokens; ++s) {
        shares[s] /= total;
      }
    }
  }

  // row += value; returns its sum.
  template <int kBytes>
  SSLDIFF_INLINE Acc add_value(const Acc* value, Acc* row) const {
    using Row = Lanes<Acc, kBytes>;
    Row total = Row::filled(Acc(0));
    for (int64_t i = 0; i < padded; i += kLanes) {
      Row sum = Row::load(row + i);
      sum.add(Row::load(value + i));
      sum.store(row + i);
      total.add(sum);
    }
    return total.sum();
  }

  // row += sum_s shares_s value_s; returns its sum.
  template <int kBytes>
  SSLDIFF_INLINE Acc add_shares(const Acc* value, const Acc* shares, Acc* row) const {
    using Row = Lanes<Acc, kBytes>;
    Row total = Row::filled(Acc(0));
    for (int64_t i = 0; i < padded; i += kLanes) {
      Row sum = Row::load(row + i);
      for (int64_t s = 0; s < vectors; ++s) {
        sum.add_product(Row::filled(shares[s]), Row::load(value + s * padded + i));
      }
      sum.store(row + i);
      total.add(sum);
    }
    return total.sum();
  }

  SSLDIFF_INLINE void store(const Acc* __restrict row, const Acc* __restrict centred, Acc scale,
                            T* __restrict out_y, T* __restrict out_z) const {
    for (int64_t i = 0; i < width; ++i) {
      out_y[i] = narrow<T>(row[i]);
    }
    for (int64_t i = 0; i < width; ++i) {
      out_z[i] = narrow<T>(centred[i] * scale * weight[i] + bias[i]);
    }
  }
};

// The rows [.., width] of a contiguous tensor, widened and padded with zeros.
template <typename From, typename Acc>
std::vector<Acc> padded_rows(const Tensor& tensor, int64_t width, int64_t padded) {
  const From* from = static_cast<const From*>(tensor.const_data_ptr());
  const int64_t rows = tensor.numel() / width;
  std::vector<Acc> made(rows * padded, Acc(0));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      made[row * padded + i] = widen(from[row * width + i]);
    }
  }
  return made;
}

template <typename T, typename Acc>
void launch(const Tensor& x, const Tensor& values, const Tensor& norm_weight,
            const Tensor& norm_bias, const std::optional<Tensor>& keys,
            const std::optional<Tensor>& offsets, int64_t heads, double eps, const Tensor& y,
            const Tensor& z) {
  const int64_t width = x.size(2);
  const int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
  const bool narrow_norm = norm_weight.scalar_type() == x.scalar_type();
  const auto widened = narrow_norm ? padded_rows<T, Acc> : padded_rows<Acc, Acc>;
  const std::vector<Acc> weight = widened(norm_weight, width, padded);
  const std::vector<Acc> bias = widened(norm_bias, width, padded);
  std::vector<Acc> value_rows, key_rows;
  const auto vectors = [&](const Tensor& tensor, std::vector<Acc>& rows) {
    if (padded == width) {
      return static_cast<const Acc*>(tensor.const_data_ptr());
    }
    rows = padded_rows<Acc, Acc>(tensor, width, padded);
    return static_cast<const Acc*>(rows.data());
  };
  const TokenAttention<T, Acc> body{
      static_cast<const T*>(x.const_data_ptr()),
      x.stride(0),
      x.stride(1),
      vectors(values, value_rows),
      keys.has_value() ? vectors(*keys, key_rows) : nullptr,
      keys.has_value() ? static_cast<const Acc*>(offsets->const_data_ptr()) : nullptr,
      weight.data(),
      bias.data(),
      static_cast<T*>(y.mutable_data_ptr()),
      static_cast<T*>(z.mutable_data_ptr()),
      x.size(1),
      width,
      padded,
      heads,
      keys.has_value() ? keys->size(1) : 1,
      static_cast<Acc>(eps)};
  // A task of some 16,000 elements is worth a thread.
  parallel_dispatch(x.size(0) * x.size(1), std::max<int64_t>(1, 16384 / width), body);
}

std::tuple<Tensor, Tensor> token_attention(Tensor x, Tensor values, Tensor norm_weight,
                                           Tensor norm_bias, std::optional<Tensor> keys,
                                           std::optional<Tensor> offsets, int64_t heads,
                                           double eps) {
  check_tokens(x, values, norm_weight, norm_bias, keys, offsets, heads, eps);
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
  const ScalarType type = x.scalar_type();
  const auto run = type == ScalarType::Double     ? launch<double, double>
                   : type == ScalarType::BFloat16 ? launch<BFloat16, float>
                   : type == ScalarType::Half     ? launch<Float16, float>
                                                  : launch<float, float>;
  run(x, values, norm_weight, norm_bias, keys, offsets, heads, eps, y, z);
  return {y, z};
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) {
  m.impl("token_attention", TORCH_BOX(&token_attention));
}

}  // namespace
}  // namespace ssldiff
