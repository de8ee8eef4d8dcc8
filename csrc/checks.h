// SPDX-License-Identifier: Apache-2.0
// Checks of the registered operators. The Python functions say the same in friendlier words first;
// these guard whoever calls torch.ops.ssldiff directly, so that nothing reads outside its memory.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "include/grid_geometry.h"

namespace ssldiff {

inline void check_codes(const torch::stable::Tensor& z, const torch::stable::Tensor& codes) {
  using torch::headeronly::ScalarType;
  const ScalarType type = z.scalar_type();
  STD_TORCH_CHECK(
      (type == ScalarType::Float || type == ScalarType::Double) && codes.scalar_type() == type,
      "vq_nearest: z and codes must both be float32 or both float64.");
  STD_TORCH_CHECK(z.dim() == 2 && codes.dim() == 2 && z.size(1) == codes.size(1) && z.size(1) > 0,
                  "vq_nearest: z and codes must be [M, D] and [K, D] with the same D above zero.");
  // Indices are kept in 32 bits beside float32 distances.
  STD_TORCH_CHECK(codes.size(0) > 0 && codes.size(0) < (int64_t{1} << 31),
                  "vq_nearest: codes must hold between 1 and 2^31 - 1 codes, but holds ",
                  codes.size(0), ".");
}

inline void check_tokens(const torch::stable::Tensor& x, const torch::stable::Tensor& values,
                         const torch::stable::Tensor& norm_weight,
                         const torch::stable::Tensor& norm_bias,
                         const std::optional<torch::stable::Tensor>& keys,
                         const std::optional<torch::stable::Tensor>& offsets, int64_t heads,
                         double eps) {
  using torch::headeronly::ScalarType;
  const ScalarType type = x.scalar_type();
  const ScalarType exact = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double ||
                      type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "token_attention: x must be float32, bfloat16, float16 or float64.");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0 && eps > 0,
                  "token_attention: x must be [N, L, C] of a width above zero, and eps above "
                  "zero.");
  const auto fits = [&](const torch::stable::Tensor& tensor, int64_t vectors) {
    return tensor.scalar_type() == exact && tensor.device() == x.device() &&
           tensor.dim() == (vectors == 0 ? 2 : 3) && tensor.size(0) == x.size(0) &&
           tensor.size(tensor.dim() - 1) == x.size(2) &&
           (vectors == 0 || tensor.size(1) == vectors);
  };
  if (keys.has_value()) {
    STD_TORCH_CHECK(keys->dim() == 3 && fits(*keys, keys->size(1)) && fits(values, keys->size(1)),
                    "token_attention: keys and values must both be [N, S, C] beside x, in float32 "
                    "(float64 for float64).");
    STD_TORCH_CHECK(heads > 0 && keys->size(1) > 0 && keys->size(1) % heads == 0,
                    "token_attention: keys has ", keys->size(1),
                    " vectors, which do not divide "
                    "into ",
                    heads, " heads.");
    STD_TORCH_CHECK(offsets.has_value() && offsets->scalar_type() == exact &&
                        offsets->device() == x.device() && offsets->dim() == 2 &&
                        offsets->size(0) == x.size(0) && offsets->size(1) == keys->size(1),
                    "token_attention: offsets must be [N, S] beside keys, in their dtype.");
  } else {
    STD_TORCH_CHECK(fits(values, 0) && !offsets.has_value() && heads == 1,
                    "token_attention: without keys, values must be [N, C] beside x, in float32 "
                    "(float64 for float64), with one head and no offsets.");
  }
  for (const torch::stable::Tensor& norm : {norm_weight, norm_bias}) {
    STD_TORCH_CHECK(norm.dim() == 1 && norm.size(0) == x.size(2) && norm.device() == x.device() &&
                        norm.scalar_type() == norm_weight.scalar_type() &&
                        (norm.scalar_type() == type || norm.scalar_type() == exact),
                    "token_attention: norm_weight and norm_bias must both be [C] beside x, in its "
                    "dtype or in that of values.");
  }
}

// The mode of this name, once everything else has been found right.
inline GridMode check_grid(const torch::stable::Tensor& grid, const torch::stable::Tensor& points,
                           const std::optional<torch::stable::Tensor>& valid,
                           const std::string& mode) {
  using torch::headeronly::ScalarType;
  const ScalarType type = grid.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "interpolate_grid: grid must be float32 or float64.");
  STD_TORCH_CHECK(grid.dim() == 4 && grid.numel() > 0,
                  "interpolate_grid: grid must be [R, K, T, D] with no size 0.");
  STD_TORCH_CHECK(points.scalar_type() == ScalarType::Double && points.dim() == 2 &&
                      points.size(1) == 2 && points.device() == grid.device(),
                  "interpolate_grid: points must be a float64 tensor [N, 2] beside grid.");
  STD_TORCH_CHECK(
      !valid.has_value() || (valid->scalar_type() == ScalarType::Bool && valid->dim() == 2 &&
                             valid->size(0) == grid.size(0) && valid->size(1) == grid.size(1) &&
                             valid->device() == grid.device()),
      "interpolate_grid: valid must be a bool tensor [R, K] beside grid.");
  constexpr const char* kNames[] = {"bilinear", "slerp", "nearest"};
  for (int i = 0; i < 3; ++i) {
    if (mode == kNames[i]) {
      return static_cast<GridMode>(i);
    }
  }
  STD_TORCH_CHECK(false, "interpolate_grid: mode is ", mode,
                  ", but it must be bilinear, slerp or nearest.");
}

inline bool is_float(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// Parameters are [C] of each channel or [N, C] of each sample; statistics [N, G].
inline void check_group_norm(const torch::stable::Tensor& x, int64_t groups,
                             const std::vector<std::optional<torch::stable::Tensor>>& of_channel,
                             const std::vector<std::optional<torch::stable::Tensor>>& of_sample,
                             const std::vector<std::optional<torch::stable::Tensor>>& statistics) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(is_float(x) && x.dim() >= 2,
                  "group_norm_silu: x must be a floating-point tensor [N, C, ...].");
  STD_TORCH_CHECK(groups > 0 && x.size(1) > 0 && x.size(1) % groups == 0,
                  "group_norm_silu: groups is ", groups, ", but it must divide the ", x.size(1),
                  " channels of x.");
  for (const auto& tensor : of_channel) {
    STD_TORCH_CHECK(
        !tensor.has_value() || (is_float(*tensor) && tensor->dim() == 1 &&
                                tensor->size(0) == x.size(1) && tensor->device() == x.device()),
        "group_norm_silu: weight and bias must be floating-point tensors [C] beside "
        "x.");
  }
  for (const auto& tensor : of_sample) {
    STD_TORCH_CHECK(!tensor.has_value() ||
                        (is_float(*tensor) && tensor->dim() == 2 && tensor->size(0) == x.size(0) &&
                         tensor->size(1) == x.size(1) && tensor->device() == x.device()),
                    "group_norm_silu: add, scale and shift must be floating-point tensors [N, C] "
                    "beside x.");
  }
  const ScalarType sum_type =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (const auto& tensor : statistics) {
    STD_TORCH_CHECK(
        tensor.has_value() == statistics[0].has_value() &&
            (!tensor.has_value() || (tensor->scalar_type() == sum_type && tensor->dim() == 2 &&
                                     tensor->size(0) == x.size(0) && tensor->size(1) == groups &&
                                     tensor->device() == x.device())),
        "group_norm_silu: mean and rstd must both be given, as float32 tensors [N, G] beside x "
        "(float64 with float64), or neither.");
  }
}

inline void check_same_maps(const torch::stable::Tensor& grad, const torch::stable::Tensor& x) {
  bool same =
      grad.dim() == x.dim() && grad.scalar_type() == x.scalar_type() && grad.device() == x.device();
  for (int64_t dim = 0; same && dim < x.dim(); ++dim) {
    same = grad.size(dim) == x.size(dim);
  }
  STD_TORCH_CHECK(same, "group_norm_silu_backward: grad must have the shape and dtype of x.");
}

inline void check_noise(const torch::stable::Tensor& out, int64_t first_row, int64_t step) {
  constexpr int64_t kLimit = int64_t{1} << 32;
  STD_TORCH_CHECK(out.scalar_type() == torch::headeronly::ScalarType::Float && out.dim() == 3 &&
                      out.is_contiguous(),
                  "philox_normal: out must be a contiguous float32 tensor [C, rows, W].");
  STD_TORCH_CHECK(
      first_row >= 0 && first_row <= kLimit - out.size(1) && out.size(0) <= kLimit &&
          out.size(2) <= kLimit && step >= 0 && step < kLimit,
      "philox_normal: coordinates and steps count from 0 and end at 2^32, but first_row "
      "is ",
      first_row, " and step is ", step, ".");
}

inline void check_counters(const torch::stable::Tensor& counters) {
  STD_TORCH_CHECK(counters.scalar_type() == torch::headeronly::ScalarType::Long &&
                      counters.dim() == 2 && counters.size(1) == 4,
                  "philox4x32: counters must be an int64 tensor [N, 4].");
}

}  // namespace ssldiff
