// SPDX-License-Identifier: Apache-2.0
// The feed-forward of a transformer block for the CPU: GEGLU's product and gates, the product back
// and the residual. What lies between stays near the core. Bits of a row depend on that row alone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "dispatch.h"
#include "gelu.h"
#include "panel_product.h"
#include "vectors.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRows = 56;  // of a block, which stays near the core while panels stream by
constexpr int64_t kGates = kPanel / 2;
constexpr int64_t kPad = 16;  // between rows, so that they are in different sets of the caches

struct FeedForward {
  const float* x;        // [M, C]
  const float* inward;   // [inner / kGates, C, kPanel]: panels of kGates values and their gates
  const float* bias;     // [2 inner], as the panels' columns lie
  const float* outward;  // [panels, inner, kPanel]
  const float* outward_bias;  // [N]
  const float* add;           // [M, N], or null
  float* out;                 // [M, N]
  int64_t rows, width, inner, out_width;
  int64_t blocks;

  template <typename Bytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, Bytes) const {
    float* gated = space(kRows * (inner + kPad));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * rows / blocks, count = (block + 1) * rows / blocks - first;
      into_gates<Bytes::value>(first, count, gated);
      back<Bytes::value>(first, count, gated);
    }
  }

  template <int kBytes>
  SSLDIFF_INLINE void into_gates(int64_t first, int64_t count, float* gated) const {
    float made[kRows * kPanel];
    for (int64_t panel = 0; panel < inner / kGates; ++panel) {
      panel_product<kBytes>(count, x + first * width, width, width, inward + panel * width * kPanel,
                            made, kPanel);
      const float* shift = bias + panel * kPanel;
      for (int64_t r = 0; r < count; ++r) {
        const float* __restrict values = made + r * kPanel;
        float* __restrict to = gated + r * (inner + kPad) + panel * kGates;
        for (int64_t c = 0; c < kGates; ++c) {
          to[c] = (values[c] + shift[c]) * gelu(values[kGates + c] + shift[kGates + c]);
        }
      }
    }
  }

  template <int kBytes>
  SSLDIFF_INLINE void back(int64_t first, int64_t count, const float* gated) const {
    float made[kRows * kPanel];
    for (int64_t panel = 0; panel < panels_of(out_width); ++panel) {
      panel_product<kBytes>(count, gated, inner + kPad, inner, outward + panel * inner * kPanel,
                            made, kPanel);
      const int64_t some = std::min(kPanel, out_width - panel * kPanel);
      const float* shift = outward_bias + panel * kPanel;
      for (int64_t r = 0; r < count; ++r) {
        const float* __restrict values = made + r * kPanel;
        const int64_t at = (first + r) * out_width + panel * kPanel;
        for (int64_t c = 0; c < some; ++c) {
          out[at + c] = values[c] + shift[c] + (add == nullptr ? 0.0f : add[at + c]);
        }
      }
    }
  }

  // A thread keeps its space.
  SSLDIFF_INLINE static float* space(int64_t size) {
    static thread_local std::unique_ptr<float[]> kept;
    static thread_local int64_t kept_size = 0;
    if (kept_size < size) {
      kept.reset(new float[size]);
      kept_size = size;
    }
    return kept.get();
  }
};

bool is_plain(const Tensor& tensor, int64_t dimensions) {
  return tensor.scalar_type() == ScalarType::Float && tensor.dim() == dimensions &&
         tensor.is_cpu() && tensor.is_contiguous();
}

const float* values_of(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

Tensor feed_forward(Tensor x, Tensor inward, Tensor bias, Tensor outward, Tensor outward_bias,
                    std::optional<Tensor> add) {
  STD_TORCH_CHECK(is_plain(x, 2), "feed_forward: x must be contiguous [M, C] float32.");
  STD_TORCH_CHECK(is_plain(outward, 3) && outward.size(2) == kPanel &&
                      outward.size(1) % kGates == 0 && is_plain(outward_bias, 1) &&
                      outward.size(0) == panels_of(outward_bias.size(0)),
                  "feed_forward: outward must be contiguous [panels, inner, 32] float32, its inner "
                  "width a multiple of 16, with panels for all of its bias [N].");
  const int64_t rows = x.size(0), width = x.size(1), inner = outward.size(1);
  const int64_t out_width = outward_bias.size(0);
  STD_TORCH_CHECK(is_plain(inward, 3) && inward.size(0) == inner / kGates &&
                      inward.size(1) == width && inward.size(2) == kPanel && is_plain(bias, 1) &&
                      bias.size(0) == 2 * inner,
                  "feed_forward: inward must be contiguous [inner / 16, C, 32] float32, and its "
                  "bias [2 inner].");
  STD_TORCH_CHECK(
      !add.has_value() || (is_plain(*add, 2) && add->size(0) == rows && add->size(1) == out_width),
      "feed_forward: add must be contiguous [M, N] float32.");
  Tensor out = torch::stable::new_empty(x, {rows, out_width});
  if (out.numel() > 0) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t blocks = (rows + kRows - 1) / kRows;
    const FeedForward body{values_of(x),
                           values_of(inward),
                           values_of(bias),
                           values_of(outward),
                           values_of(outward_bias),
                           add.has_value() ? values_of(*add) : nullptr,
                           static_cast<float*>(out.mutable_data_ptr()),
                           rows,
                           width,
                           inner,
                           out_width,
                           std::min((blocks + threads - 1) / threads * threads, rows)};
    parallel_dispatch(body.blocks, 1, body);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) { m.impl("feed_forward", TORCH_BOX(&feed_forward)); }

}  // namespace
}  // namespace ssldiff
