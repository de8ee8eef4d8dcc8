// SPDX-License-Identifier: Apache-2.0
// The gradient of group_norm_silu for the CPU; its equations stand in ops/group_norm_silu.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "group_norm.h"
#include "silu.h"

namespace ssldiff {
namespace {

// Where the gradients of the parameters go; all in the type that sums run in.
template <typename Acc>
struct ParameterGradients {
  Acc* add;    // [N, C]
  Acc* scale;  // [N, C]
  Acc* shift;  // [N, C]
};

template <typename T, typename Acc, bool kSilu>
struct GroupNormSiluBackward {
  // In 32 and 64 bits gz waits in grad_x for the second pass; 16 bits would round it.
  static constexpr bool kKeeps = kSilu && sizeof(T) > 2;
  static constexpr int kSums = 3;   // of gz, of gz d and of d, with d = x - center
  static constexpr int kKinds = 5;  // center, slope, offset; grad_x = gz slope + d curve + level

  const GroupShape& shape;
  const Parameters<Acc>& parameters;
  MapPointer<const T> x;
  MapPointer<const T> grad;
  MapPointer<T> grad_x;
  const Acc* mean;  // [N, G]
  const Acc* rstd;  // [N, G]
  ParameterGradients<Acc> gradients;
  Acc* normed;  // [N, C], the sum of gz times the normed value
  Acc* tables;  // [N, 5, C]
  Acc* sums;    // [N, chunks, 3, C]
  bool given, dense;

  SSLDIFF_INLINE Acc* table(int64_t n) const { return tables + n * kKinds * shape.channels; }

  SSLDIFF_INLINE Acc* chunk_sums(int64_t n, int64_t chunk) const {
    return sums + (n * shape.chunks + chunk) * kSums * shape.channels;
  }

  void prepare(int64_t n) const {
    std::vector<double> values(2 * shape.channels);
    for (int64_t c = 0; c < shape.channels; ++c) {
      const int64_t i = n * shape.groups + c / shape.group_channels;
      values[c] = static_cast<double>(mean[i]);
      values[shape.channels + c] = static_cast<double>(rstd[i]);
    }
    parameters.line(n, values.data(), values.data() + shape.channels, shape.channels, table(n));
  }

  template <typename Bytes>
  SSLDIFF_INLINE void first_pass(int64_t n, int64_t u, Bytes) const {
    const Unit unit = shape.unit(u);
    const T *from = x.at(n, unit), *from_grad = grad.at(n, unit);
    T* to = grad_x.at(n, unit);
    Acc* folded = chunk_sums(n, unit.chunk);
    if (shape.planes()) {
      for (int64_t c = 0; c < unit.channels; ++c) {
        const int64_t channel = unit.channel + c;
        const T *plane = from + c * x.stride_c, *plane_grad = from_grad + c * grad.stride_c;
        T* kept = to + c * grad_x.stride_c;
        if (unit.size < kSmallPlane) {
          add_plane<kFewLanes>(plane, plane_grad, kept, n, channel, unit.size, folded + channel);
        } else {
          add_plane<kManyLanes>(plane, plane_grad, kept, n, channel, unit.size, folded + channel);
        }
      }
      return;
    }
    const Rows<Acc> rows(shape, unit, table(n), 3, dense);
    std::vector<Acc> total(kSums * rows.width);
    const int64_t step = rows.step(x.stride_l), grad_step = rows.step(grad.stride_l);
    const int64_t out_step = rows.step(grad_x.stride_l);
    for (int64_t row = 0; row <= rows.count; ++row) {
      const int64_t count = row < rows.count ? rows.width : rows.tail;
      add_row(from + row * step, from_grad + row * grad_step, to + row * out_step, rows.kind(0),
              rows.kind(1), rows.kind(2), count, total.data(), total.data() + rows.width,
              total.data() + 2 * rows.width);
    }
    std::fill_n(folded, kSums * shape.channels, Acc(0));
    for (int64_t i = 0; i < kSums * rows.repeats; ++i) {
      Acc* to = folded + i / rows.repeats * shape.channels;
      for (int64_t c = 0; c < shape.channels; ++c) {
        to[c] += total[i * shape.channels + c];
      }
    }
  }

  template <int64_t kLanes>
  SSLDIFF_INLINE void add_plane(const T* plane, const T* plane_grad, T* kept, int64_t n,
                                int64_t channel, int64_t size, Acc* folded) const {
    Acc total[kSums][kLanes] = {};
    const Constant<Acc> center = constant(n, channel, 0), slope = constant(n, channel, 1);
    const Constant<Acc> offset = constant(n, channel, 2);
    int64_t first = 0;
    for (; first + kLanes <= size; first += kLanes) {
      add_row(plane + first, plane_grad + first, kept + first, center, slope, offset, kLanes,
              total[0], total[1], total[2]);
    }
    add_row(plane + first, plane_grad + first, kept + first, center, slope, offset, size - first,
            total[0], total[1], total[2]);
    for (int sum = 0; sum < kSums; ++sum) {
      folded[sum * shape.channels] = fold<kLanes>(total[sum]);
    }
  }

  SSLDIFF_INLINE Constant<Acc> constant(int64_t n, int64_t channel, int kind) const {
    return {table(n)[kind * shape.channels + channel]};
  }

  SSLDIFF_INLINE static Acc through_silu(Acc value, Acc gradient) {
    return kSilu ? gradient * silu_slope<T>(value) : gradient;
  }

  template <typename Row>
  SSLDIFF_INLINE static void add_row(const T* __restrict x, const T* __restrict grad,
                                     T* __restrict kept, const Row center, const Row slope,
                                     const Row offset, int64_t count, Acc* __restrict sum_gz,
                                     Acc* __restrict sum_gzd, Acc* __restrict sum_d) {
    for (int64_t i = 0; i < count; ++i) {
      const Acc d = widen(x[i]) - center[i];
      const Acc gz = through_silu(d * slope[i] + offset[i], widen(grad[i]));
      if constexpr (kKeeps) {
        kept[i] = gz;
      }
      sum_gz[i] += gz;
      sum_gzd[i] += gz * d;
      sum_d[i] += d;
    }
  }

  // Channel sums, then group sums, then the lines of the second pass.
  SSLDIFF_INLINE void between(int64_t n) const {
    const int64_t channels = shape.channels;
    std::vector<double> total(kSums * channels);
    for (int64_t chunk = 0; chunk < shape.chunks; ++chunk) {
      const Acc* part = chunk_sums(n, chunk);
      for (int64_t i = 0; i < kSums * channels; ++i) {
        total[i] += static_cast<double>(part[i]);
      }
    }
    for (int64_t g = 0; g < shape.groups; ++g) {
      finish_group(n, g, total.data(), total.data() + channels, total.data() + 2 * channels);
    }
  }

  SSLDIFF_INLINE void finish_group(int64_t n, int64_t g, const double* gz, double* gzx,
                                   double* xs) const {
    const auto mu = static_cast<double>(mean[n * shape.groups + g]);
    const auto r = static_cast<double>(rstd[n * shape.groups + g]);
    const int64_t first = g * shape.group_channels, last = first + shape.group_channels;
    const Acc *w = parameters.weight.of(0), *b = parameters.bias.of(0);
    const Acc *a = parameters.add.of(n), *sc = parameters.scale.of(n);
    Acc* rows = table(n);
    double level = 0, curve = 0;
    for (int64_t c = first; c < last; ++c) {
      // What rounding the center left over, see Parameters::line.
      const double rest = static_cast<double>(rows[c]) - (mu - static_cast<double>(a[c]));
      gzx[c] = r * (gzx[c] + rest * gz[c]);
      xs[c] = r * (xs[c] + rest * static_cast<double>(shape.positions));
      const double gain = static_cast<double>(w[c]) * (1.0 + static_cast<double>(sc[c]));
      level += gain * gz[c];
      curve += gain * gzx[c];
    }
    level = given ? 0 : -r * level / shape.group_size();
    curve = given ? 0 : -r * curve / shape.group_size();
    for (int64_t c = first; c < last; ++c) {
      const int64_t i = n * shape.channels + c;
      const double gain = static_cast<double>(w[c]) * (1.0 + static_cast<double>(sc[c]));
      const double rest = static_cast<double>(rows[c]) - (mu - static_cast<double>(a[c]));
      rows[3 * shape.channels + c] = static_cast<Acc>(curve * r);
      rows[4 * shape.channels + c] = static_cast<Acc>(level + curve * r * rest);
      gradients.add[i] = static_cast<Acc>(
          r * gain * gz[c] + level * static_cast<double>(shape.positions) + curve * xs[c]);
      gradients.scale[i] =
          static_cast<Acc>(static_cast<double>(w[c]) * gzx[c] + static_cast<double>(b[c]) * gz[c]);
      gradients.shift[i] = static_cast<Acc>(gz[c]);
      normed[i] = static_cast<Acc>(gzx[c]);
    }
  }

  template <typename Bytes>
  SSLDIFF_INLINE void second_pass(int64_t n, int64_t u, Bytes) const {
    const Unit unit = shape.unit(u);
    const T *from = x.at(n, unit), *from_grad = grad.at(n, unit);
    T* to = grad_x.at(n, unit);
    if (shape.planes()) {
      for (int64_t c = 0; c < unit.channels; ++c) {
        const int64_t channel = unit.channel + c;
        apply(from + c * x.stride_c, from_grad + c * grad.stride_c, constant(n, channel, 0),
              constant(n, channel, 1), constant(n, channel, 2), constant(n, channel, 3),
              constant(n, channel, 4), unit.size, to + c * grad_x.stride_c);
      }
      return;
    }
    const Rows<Acc> rows(shape, unit, table(n), kKinds, dense);
    const int64_t step = rows.step(x.stride_l), grad_step = rows.step(grad.stride_l);
    const int64_t out_step = rows.step(grad_x.stride_l);
    for (int64_t row = 0; row <= rows.count; ++row) {
      const int64_t count = row < rows.count ? rows.width : rows.tail;
      apply(from + row * step, from_grad + row * grad_step, rows.kind(0), rows.kind(1),
            rows.kind(2), rows.kind(3), rows.kind(4), count, to + row * out_step);
    }
  }

  template <typename Row>
  SSLDIFF_INLINE static void apply(const T* __restrict x, const T* __restrict grad,
                                   const Row center, const Row slope, const Row offset,
                                   const Row curve, const Row level, int64_t count,
                                   T* __restrict to) {
    for (int64_t i = 0; i < count; ++i) {
      const Acc d = widen(x[i]) - center[i];
      Acc gz;
      if constexpr (kKeeps) {
        gz = to[i];
      } else {
        gz = through_silu(d * slope[i] + offset[i], widen(grad[i]));
      }
      to[i] = narrow<T>(gz * slope[i] + (d * curve[i] + level[i]));
    }
  }

  // Sums over the samples, in their order.
  void finish(Acc* grad_weight, Acc* grad_bias) const {
    std::vector<double> weight(shape.channels), bias(shape.channels);
    for (int64_t n = 0; n < shape.samples; ++n) {
      const Acc* sc = parameters.scale.of(n);
      for (int64_t c = 0; c < shape.channels; ++c) {
        const double gain = 1.0 + static_cast<double>(sc[c]);
        weight[c] += gain * static_cast<double>(normed[n * shape.channels + c]);
        bias[c] += gain * static_cast<double>(gradients.shift[n * shape.channels + c]);
      }
    }
    for (int64_t c = 0; c < shape.channels; ++c) {
      grad_weight[c] = static_cast<Acc>(weight[c]);
      grad_bias[c] = static_cast<Acc>(bias[c]);
    }
  }
};

struct Gradients {
  Tensor x, weight, bias, add, scale, shift;
};

template <typename Acc>
Acc* pointer(const Tensor& tensor) {
  return static_cast<Acc*>(tensor.mutable_data_ptr());
}

template <typename T, typename Acc, bool kSilu>
void launch(const Tensor& grad, const Tensor& x, const Tensor& grad_x, MapLayout layout,
            int64_t groups, const Parameters<Acc>& parameters, const Tensor& mean,
            const Tensor& rstd, bool given, const Gradients& made) {
  const Maps maps = maps_of(x), grad_maps = maps_of(grad), out_maps = maps_of(grad_x);
  const GroupShape shape(maps, layout, groups);
  const int64_t elements = shape.samples * shape.channels;
  std::vector<Acc> normed(elements), tables(5 * elements);
  std::vector<Acc> sums(3 * elements * shape.chunks);
  const int64_t gapless = shape.channels;
  const GroupNormSiluBackward<T, Acc, kSilu> body{
      shape,
      parameters,
      MapPointer<const T>(x, maps),
      MapPointer<const T>(grad, grad_maps),
      MapPointer<T>(grad_x, out_maps),
      pointer<Acc>(mean),
      pointer<Acc>(rstd),
      {pointer<Acc>(made.add), pointer<Acc>(made.scale), pointer<Acc>(made.shift)},
      normed.data(),
      tables.data(),
      sums.data(),
      given,
      maps.stride_l == gapless && grad_maps.stride_l == gapless && out_maps.stride_l == gapless};
  for (int64_t n = 0; n < shape.samples; ++n) {
    body.prepare(n);
  }
  run_passes(body, 2 * shape.channels * shape.positions * static_cast<int64_t>(sizeof(T)));
  body.finish(pointer<Acc>(made.weight), pointer<Acc>(made.bias));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    Tensor grad, Tensor x, int64_t groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> add, std::optional<Tensor> scale, std::optional<Tensor> shift,
    Tensor mean, Tensor rstd, bool given, bool silu) {
  check_group_norm(x, groups, {weight, bias}, {add, scale, shift}, {mean, rstd});
  check_same_maps(grad, x);
  const ScalarType type = x.scalar_type();
  const ScalarType sum_type = type == ScalarType::Double ? type : ScalarType::Float;
  const int64_t samples = x.size(0), channels = x.size(1);
  const auto zeros = [&](auto... sizes) {
    return torch::stable::new_zeros(x, {sizes...}, sum_type);
  };
  const Gradients made{
      torch::stable::empty_like(x), zeros(channels),          zeros(channels),
      zeros(samples, channels),     zeros(samples, channels), zeros(samples, channels)};
  const auto result =
      std::make_tuple(made.x, made.weight, made.bias, made.add, made.scale, made.shift);
  if (x.numel() == 0) {
    return result;
  }
  MapLayout layout = maps_of(made.x).layout();
  const bool odd = layout == MapLayout::kNeither;
  Tensor grad_x = odd ? torch::stable::empty_like(torch::stable::contiguous(x)) : made.x;
  layout = maps_of(grad_x).layout();
  x = arranged(x, grad_x, layout);
  grad = arranged(grad, grad_x, layout);
  mean = torch::stable::contiguous(mean);
  rstd = torch::stable::contiguous(rstd);
  const auto run = [&](auto element, auto accumulator) {
    using T = decltype(element);
    using Acc = decltype(accumulator);
    const Parameters<Acc> parameters(weight, bias, add, scale, shift, channels);
    const auto with = silu ? &launch<T, Acc, true> : &launch<T, Acc, false>;
    with(grad, x, grad_x, layout, groups, parameters, mean, rstd, given, made);
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
    Tensor target = made.x;
    torch::stable::copy_(target, grad_x);
  }
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) {
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace
}  // namespace ssldiff
