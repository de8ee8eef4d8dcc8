// SPDX-License-Identifier: Apache-2.0
// group_norm_silu for the CPU; the equations stand in ops/group_norm_silu.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "group_norm.h"
#include "group_statistics.h"
#include "silu.h"

namespace ssldiff {
namespace {

template <typename T, typename Acc, bool kSilu>
struct GroupNormSilu {
  const GroupShape& shape;
  const GroupStatistics<T, Acc>& statistics;
  const Parameters<Acc>& parameters;
  MapPointer<T> out;
  Acc* mean;   // [N, G], given or made
  Acc* rstd;   // [N, G]
  Acc* lines;  // [N, 3, C]
  double eps;
  bool given, dense;
  bool streams;  // whether the output is larger than the caches

  template <int kBytes>
  SSLDIFF_INLINE void first_pass(int64_t n, int64_t u, VectorBytes<kBytes>) const {
    if (!given) {
      statistics.template measure<kBytes>(n, u);
    }
  }

  SSLDIFF_INLINE void between(int64_t n) const {
    std::vector<double> values(2 * shape.channels);
    for (int64_t g = 0; g < shape.groups; ++g) {
      const int64_t i = n * shape.groups + g;
      double group_mean, group_rstd;
      if (given) {
        group_mean = static_cast<double>(mean[i]);
        group_rstd = static_cast<double>(rstd[i]);
      } else {
        const Moments moments = statistics.group(n, g);
        group_mean = moments.mean;
        group_rstd = 1.0 / std::sqrt(moments.m2 / moments.count + eps);
        mean[i] = static_cast<Acc>(group_mean);
        rstd[i] = static_cast<Acc>(group_rstd);
      }
      const int64_t first = g * shape.group_channels;
      std::fill_n(values.data() + first, shape.group_channels, group_mean);
      std::fill_n(values.data() + shape.channels + first, shape.group_channels, group_rstd);
    }
    parameters.line(n, values.data(), values.data() + shape.channels, shape.channels,
                    lines + 3 * n * shape.channels);
  }

  template <int kBytes>
  SSLDIFF_INLINE void second_pass(int64_t n, int64_t u, VectorBytes<kBytes>) const {
    apply_unit<kBytes>(n, u);
    if (streams) {
      stream_fence();
    }
  }

  template <int kBytes>
  SSLDIFF_INLINE void apply_unit(int64_t n, int64_t u) const {
    const Unit unit = shape.unit(u);
    const Acc* table = lines + 3 * n * shape.channels;
    const T* from = statistics.x.at(n, unit);
    T* to = out.at(n, unit);
    if (shape.planes()) {
      for (int64_t c = 0; c < unit.channels; ++c) {
        const Acc* line = table + unit.channel + c;
        apply<kBytes>(from + c * statistics.x.stride_c, Constant<Acc>{line[0]},
                      Constant<Acc>{line[shape.channels]}, Constant<Acc>{line[2 * shape.channels]},
                      unit.size, to + c * out.stride_c);
      }
      return;
    }
    const Rows<Acc> rows(shape, unit, table, 3, dense);
    const int64_t step = rows.step(statistics.x.stride_l), out_step = rows.step(out.stride_l);
    for (int64_t row = 0; row <= rows.count; ++row) {
      const int64_t width = row < rows.count ? rows.width : rows.tail;
      apply<kBytes>(from + row * step, rows.kind(0), rows.kind(1), rows.kind(2), width,
                    to + row * out_step);
    }
  }

  // Of an element, or of a vector of them.
  template <typename Values>
  SSLDIFF_INLINE static Values normed(Values x, Values center, Values slope, Values offset) {
    const Values value = (x - center) * slope + offset;
    if constexpr (kSilu) {
      return silu<T>(value);
    } else {
      return value;
    }
  }

  template <int kBytes, typename Row>
  SSLDIFF_INLINE void apply(const T* x, const Row center, const Row slope, const Row offset,
                            int64_t width, T* to) const {
    int64_t i = 0;
    if constexpr (std::is_same_v<Acc, float>) {
      constexpr int kParts = sizeof(Acc) / sizeof(T);
      constexpr int kLanes = kBytes / static_cast<int>(sizeof(Acc));
      const bool past = streams && reinterpret_cast<uintptr_t>(to) % kBytes == 0;
      for (; i + kParts * kLanes <= width; i += kParts * kLanes) {
        Vector<Acc, kBytes> made[kParts];
        for (int part = 0; part < kParts; ++part) {
          const int64_t at = i + part * kLanes;
          made[part] = normed(widen_lanes<kBytes, Acc>(x + at), lanes_at<kBytes>(center, at),
                              lanes_at<kBytes>(slope, at), lanes_at<kBytes>(offset, at));
        }
        store_vector<kBytes>(to + i, narrow_lanes<kBytes, T, Acc>(made), past);
      }
    }
    for (; i < width; ++i) {
      to[i] = narrow<T>(normed<Acc>(widen(x[i]), center[i], slope[i], offset[i]));
    }
  }
};

struct Statistics {
  Tensor mean, rstd;
  bool given;
};

template <typename T, typename Acc>
void launch(const Tensor& x, const Tensor& out, MapLayout layout, int64_t groups,
            const Parameters<Acc>& parameters, const Statistics& given, double eps, bool silu) {
  const Maps maps = maps_of(x), out_maps = maps_of(out);
  const GroupShape shape(maps, layout, groups);
  const GroupStatistics<T, Acc> statistics(shape, MapPointer<const T>(x, maps), parameters.add);
  std::vector<Acc> lines(3 * shape.samples * shape.channels);
  const bool dense = maps.stride_l == shape.channels && out_maps.stride_l == shape.channels;
  const int64_t sample_bytes = shape.channels * shape.positions * static_cast<int64_t>(sizeof(T));
  const int64_t bytes = shape.samples * sample_bytes;
  const auto run = [&](auto with_silu) {
    const GroupNormSilu<T, Acc, decltype(with_silu)::value> body{
        shape,
        statistics,
        parameters,
        MapPointer<T>(out, out_maps),
        static_cast<Acc*>(given.mean.mutable_data_ptr()),
        static_cast<Acc*>(given.rstd.mutable_data_ptr()),
        lines.data(),
        eps,
        given.given,
        dense,
        bytes >= kStreamBytes};
    run_passes(body, sample_bytes);
  };
  if (silu) {
    run(std::true_type());
  } else {
    run(std::false_type());
  }
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(
    Tensor x, int64_t groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> add, std::optional<Tensor> scale, std::optional<Tensor> shift,
    std::optional<Tensor> mean, std::optional<Tensor> rstd, double eps, bool silu) {
  check_group_norm(x, groups, {weight, bias}, {add, scale, shift}, {mean, rstd});
  const ScalarType type = x.scalar_type();
  const ScalarType sum_type = type == ScalarType::Double ? type : ScalarType::Float;
  const bool given = mean.has_value();
  const auto statistic = [&](const std::optional<Tensor>& from) {
    // A copy, so that no output is an input.
    return given ? torch::stable::clone(torch::stable::contiguous(*from))
                 : torch::stable::new_zeros(x, {x.size(0), groups}, sum_type);
  };
  const Statistics statistics{statistic(mean), statistic(rstd), given};
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) {
    return {out, statistics.mean, statistics.rstd};
  }
  // Maps in an order of dimensions that is neither of the two go through contiguous ones.
  MapLayout layout = maps_of(out).layout();
  const bool odd = layout == MapLayout::kNeither;
  Tensor made = odd ? torch::stable::empty_like(torch::stable::contiguous(x)) : out;
  layout = maps_of(made).layout();
  x = arranged(x, made, layout);
  const auto run = [&](auto element, auto accumulator) {
    using Acc = decltype(accumulator);
    const Parameters<Acc> parameters(weight, bias, add, scale, shift, x.size(1));
    launch<decltype(element), Acc>(x, made, layout, groups, parameters, statistics, eps, silu);
  };
  if (type == ScalarType::Double) {
    run(double(), double());
  } else if (type == ScalarType::BFloat16) {
    run(BFloat16(), float());
  } else if (type == ScalarType::Half) {
    run(Float16(), float());
  } else {
    run(float(), float());
  }
  if (odd) {
    torch::stable::copy_(out, made);
  }
  return {out, statistics.mean, statistics.rstd};
}

template <typename T, typename Acc>
struct StatisticsAlone {
  const GroupShape& shape;
  const GroupStatistics<T, Acc>& statistics;
  Acc* mean;  // [N, G]
  Acc* m2;    // [N, G]

  template <int kBytes>
  SSLDIFF_INLINE void first_pass(int64_t n, int64_t u, VectorBytes<kBytes>) const {
    statistics.template measure<kBytes>(n, u);
  }

  SSLDIFF_INLINE void between(int64_t n) const {
    for (int64_t g = 0; g < shape.groups; ++g) {
      const Moments moments = statistics.group(n, g);
      mean[n * shape.groups + g] = static_cast<Acc>(moments.mean);
      m2[n * shape.groups + g] = static_cast<Acc>(moments.m2);
    }
  }

  template <typename Bytes>
  SSLDIFF_INLINE void second_pass(int64_t, int64_t, Bytes) const {}
};

std::tuple<Tensor, Tensor> group_norm_statistics(Tensor x, int64_t groups) {
  check_group_norm(x, groups, {}, {}, {});
  const ScalarType type = x.scalar_type();
  const ScalarType sum_type = type == ScalarType::Double ? type : ScalarType::Float;
  Tensor mean = torch::stable::new_zeros(x, {x.size(0), groups}, sum_type);
  Tensor m2 = torch::stable::new_zeros(x, {x.size(0), groups}, sum_type);
  if (x.numel() == 0) {
    return {mean, m2};
  }
  if (maps_of(x).layout() == MapLayout::kNeither) {
    Tensor packed = torch::stable::empty_like(x);
    torch::stable::copy_(packed, x);
    x = maps_of(packed).layout() == MapLayout::kNeither ? torch::stable::contiguous(x) : packed;
  }
  const auto run = [&](auto element, auto accumulator) {
    using T = decltype(element);
    using Acc = decltype(accumulator);
    const Maps maps = maps_of(x);
    const GroupShape shape(maps, maps.layout(), groups);
    const Parameter<Acc> nothing(std::nullopt, shape.channels, 0);
    const GroupStatistics<T, Acc> statistics(shape, MapPointer<const T>(x, maps), nothing);
    const StatisticsAlone<T, Acc> body{shape, statistics,
                                       static_cast<Acc*>(mean.mutable_data_ptr()),
                                       static_cast<Acc*>(m2.mutable_data_ptr())};
    run_passes(body, shape.channels * shape.positions * static_cast<int64_t>(sizeof(T)));
  };
  if (type == ScalarType::Double) {
    run(double(), double());
  } else if (type == ScalarType::BFloat16) {
    run(BFloat16(), float());
  } else if (type == ScalarType::Half) {
    run(Float16(), float());
  } else {
    run(float(), float());
  }
  return {mean, m2};
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_statistics", TORCH_BOX(&group_norm_statistics));
}

}  // namespace
}  // namespace ssldiff
