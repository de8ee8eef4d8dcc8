// SPDX-License-Identifier: Apache-2.0
// What group_norm_silu forward and backward share on the CPU: layouts, pieces of work, parameters,
// and the order in which a sample's two passes run.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "../include/half.h"
#include "dispatch.h"
#include "vectors.h"

namespace ssldiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// kLanes: the channels of a position lie side by side (channels-last); kPlanes: the positions of a
// channel do.
enum class MapLayout { kLanes, kPlanes, kNeither };

// Feature maps [N, C, ...] seen as [N, C, L].
struct Maps {
  int64_t samples, channels, positions;
  int64_t stride_n, stride_c, stride_l;
  bool one_stride;  // whether the positions lie at equal distances

  bool fits(MapLayout layout) const {
    if (layout == MapLayout::kLanes) {
      return one_stride && (channels == 1 || stride_c == 1);
    }
    return layout == MapLayout::kPlanes && one_stride && (positions == 1 || stride_l == 1);
  }

  MapLayout layout() const {
    const bool planes = fits(MapLayout::kPlanes);
    if (fits(MapLayout::kLanes) && !(planes && channels == 1)) {
      return MapLayout::kLanes;
    }
    return planes ? MapLayout::kPlanes : MapLayout::kNeither;
  }
};

inline Maps maps_of(const Tensor& x) {
  Maps maps{x.size(0), x.size(1), 1, x.stride(0), x.stride(1), 1, true};
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) {
    if (x.size(dim) == 1) {
      continue;
    }
    if (maps.positions == 1) {
      maps.stride_l = x.stride(dim);
    } else if (x.stride(dim) != maps.stride_l * maps.positions) {
      maps.one_stride = false;
    }
    maps.positions *= x.size(dim);
  }
  return maps;
}

// x, or a copy of it laid out as `like`, so that it fits.
inline Tensor arranged(const Tensor& x, const Tensor& like, MapLayout layout) {
  if (maps_of(x).fits(layout)) {
    return x;
  }
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, x);
  return copy;
}

// A unit of work is a chunk of positions, of all channels (kLanes), or of some channels of a group
// (kPlanes). Its size depends on the shape alone, so the order of every sum is the same for any
// number of threads.
struct Unit {
  int64_t channel, channels, chunk, first, size;
};

struct GroupShape {
  static constexpr int64_t kChunkElements = 65536;
  static constexpr int64_t kPlaneElements = 16384;

  GroupShape(const Maps& maps, MapLayout map_layout, int64_t group_count)
      : layout(map_layout),
        samples(maps.samples),
        channels(maps.channels),
        positions(maps.positions),
        groups(group_count),
        group_channels(maps.channels / group_count),
        chunk(planes() ? kPlaneElements
                       : std::clamp<int64_t>(kChunkElements / channels / 8 * 8, 8, 2048)),
        chunks((positions + chunk - 1) / chunk),
        block(planes() ? std::clamp<int64_t>(kPlaneElements / positions, 1, group_channels)
                       : channels),
        blocks(planes() ? (group_channels + block - 1) / block : 1),
        units(planes() ? groups * blocks * chunks : chunks) {}

  bool planes() const { return layout == MapLayout::kPlanes; }

  SSLDIFF_INLINE Unit unit(int64_t u) const {
    const int64_t i = u % chunks, first = i * chunk;
    const int64_t group = u / chunks / blocks, part = u / chunks % blocks;
    const int64_t count = planes() ? std::min(block, group_channels - part * block) : channels;
    return {group * group_channels + part * block, count, i, first,
            std::min(chunk, positions - first)};
  }

  double group_size() const { return static_cast<double>(group_channels * positions); }

  MapLayout layout;
  int64_t samples, channels, positions, groups, group_channels;
  int64_t chunk, chunks, block, blocks, units;
};

template <typename T>
struct MapPointer {
  MapPointer(const Tensor& tensor, const Maps& maps)
      : data(static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()))),
        stride_n(maps.stride_n),
        stride_c(maps.stride_c),
        stride_l(maps.stride_l) {}

  SSLDIFF_INLINE T* at(int64_t n, const Unit& unit) const {
    return data + n * stride_n + unit.channel * stride_c + unit.first * stride_l;
  }

  T* data;
  int64_t stride_n, stride_c, stride_l;
};

// A parameter [C] or [N, C] in the type that sums run in; where there is none, a constant.
template <typename Acc>
class Parameter {
 public:
  Parameter(const std::optional<Tensor>& tensor, int64_t channels, double otherwise) {
    if (!tensor.has_value()) {
      values_.assign(channels, static_cast<Acc>(otherwise));
      data_ = values_.data();
      return;
    }
    stride_ = tensor->dim() == 2 ? channels : 0;
    const bool same = tensor->scalar_type() ==
                      (std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float);
    if (same && tensor->is_contiguous()) {
      data_ = static_cast<const Acc*>(tensor->const_data_ptr());
      return;
    }
    convert(*tensor);
    data_ = values_.data();
  }

  SSLDIFF_INLINE const Acc* of(int64_t n) const { return data_ + n * stride_; }

 private:
  void convert(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
      case ScalarType::Double:
        return convert_from<double>(tensor);
      case ScalarType::BFloat16:
        return convert_from<BFloat16>(tensor);
      case ScalarType::Half:
        return convert_from<Float16>(tensor);
      default:
        return convert_from<float>(tensor);
    }
  }

  template <typename From>
  void convert_from(const Tensor& tensor) {
    const auto* from = static_cast<const From*>(tensor.const_data_ptr());
    const bool by_sample = tensor.dim() == 2;
    const int64_t stride_n = by_sample ? tensor.stride(0) : 0;
    const int64_t stride_c = tensor.stride(tensor.dim() - 1);
    values_.reserve(tensor.numel());
    for (int64_t n = 0; n < (by_sample ? tensor.size(0) : 1); ++n) {
      for (int64_t c = 0; c < tensor.size(tensor.dim() - 1); ++c) {
        values_.push_back(static_cast<Acc>(widen(from[n * stride_n + c * stride_c])));
      }
    }
  }

  std::vector<Acc> values_;
  const Acc* data_ = nullptr;
  int64_t stride_ = 0;
};

template <typename Acc>
struct Parameters {
  Parameters(const std::optional<Tensor>& weight_, const std::optional<Tensor>& bias_,
             const std::optional<Tensor>& add_, const std::optional<Tensor>& scale_,
             const std::optional<Tensor>& shift_, int64_t channels)
      : weight(weight_, channels, 1),
        bias(bias_, channels, 0),
        add(add_, channels, 0),
        scale(scale_, channels, 0),
        shift(shift_, channels, 0) {}

  // Rows center, slope, offset of `out` [3, C], with which the normed, scaled and shifted value is
  // (x - center) slope + offset. The mean is taken away first: x slope - mean slope would cancel.
  // What rounding the center to Acc leaves over goes into the offset.
  SSLDIFF_INLINE void line(int64_t n, const double* mean, const double* rstd, int64_t channels,
                           Acc* __restrict out) const {
    const Acc *w = weight.of(0), *b = bias.of(0), *a = add.of(n);
    const Acc *sc = scale.of(n), *sh = shift.of(n);
    for (int64_t c = 0; c < channels; ++c) {
      const double exact = mean[c] - static_cast<double>(a[c]);
      const Acc center = static_cast<Acc>(exact);
      const double gain = 1.0 + static_cast<double>(sc[c]);
      const double slope = rstd[c] * static_cast<double>(w[c]) * gain;
      out[c] = center;
      out[channels + c] = static_cast<Acc>(slope);
      out[2 * channels + c] =
          static_cast<Acc>(static_cast<double>(b[c]) * gain + static_cast<double>(sh[c]) +
                           slope * (static_cast<double>(center) - exact));
    }
  }

  Parameter<Acc> weight, bias, add, scale, shift;
};

// One value for every element, read as a row of coefficients is.
template <typename Acc>
struct Constant {
  SSLDIFF_INLINE Acc operator[](int64_t) const { return value; }
  Acc value;
};

// A vector of coefficients, from element i of a row on.
template <int kBytes, typename Acc>
SSLDIFF_INLINE Vector<Acc, kBytes> lanes_at(const Acc* row, int64_t i) {
  return load_lanes<Acc, kBytes>(row + i);
}

template <int kBytes, typename Acc>
SSLDIFF_INLINE Vector<Acc, kBytes> lanes_at(Constant<Acc> row, int64_t) {
  return repeat<kBytes>(row.value);
}

// A unit of channels-last maps as rows of equal width, with a coefficient for each element of a
// row. Positions of few channels are joined to one row, so that the inner loop is long.
template <typename Acc>
struct Rows {
  static constexpr int64_t kWidth = 128;

  // `table` [kinds, C] holds the coefficients of a sample; dense says that all tensors concerned
  // keep their positions without a gap.
  SSLDIFF_INLINE Rows(const GroupShape& shape, const Unit& unit, const Acc* table, int kinds,
                      bool dense)
      : repeats(dense ? std::max<int64_t>(kWidth / shape.channels, 1) : 1),
        width(shape.channels * repeats),
        count(unit.size / repeats),
        tail(unit.size % repeats * shape.channels),
        coefficients_(table) {
    if (repeats > 1) {
      buffer_.resize(kinds * width);
      for (int64_t i = 0; i < kinds * repeats; ++i) {
        const Acc* from = table + i / repeats * shape.channels;
        std::copy(from, from + shape.channels, buffer_.data() + i * shape.channels);
      }
      coefficients_ = buffer_.data();
    }
  }

  SSLDIFF_INLINE const Acc* kind(int index) const { return coefficients_ + index * width; }

  // Elements from one row to the next.
  SSLDIFF_INLINE int64_t step(int64_t stride_l) const { return repeats * stride_l; }

  int64_t repeats, width, count, tail;

 private:
  const Acc* coefficients_;
  std::vector<Acc> buffer_;
};

// A plane is summed in this many lanes, a small one in fewer; then halves are added to halves.
constexpr int64_t kManyLanes = 64;
constexpr int64_t kFewLanes = 16;
constexpr int64_t kSmallPlane = 512;

template <int64_t kLanes, typename Acc>
SSLDIFF_INLINE Acc fold(Acc* __restrict lanes) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      lanes[i] += lanes[half + i];
    }
  }
  return lanes[0];
}

template <typename Body>
struct WholeSamples {
  const Body& body;

  template <typename Bytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, Bytes bytes) const {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t u = 0; u < body.shape.units; ++u) {
        body.first_pass(n, u, bytes);
      }
      body.between(n);
      for (int64_t u = 0; u < body.shape.units; ++u) {
        body.second_pass(n, u, bytes);
      }
    }
  }
};

template <typename Body, bool kSecond>
struct OnePass {
  const Body& body;
  int64_t sample;

  template <typename Bytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, Bytes bytes) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = sample + i / body.shape.units;
      if constexpr (kSecond) {
        body.second_pass(n, i % body.shape.units, bytes);
      } else {
        body.first_pass(n, i % body.shape.units, bytes);
      }
    }
  }
};

// Runs body.first_pass(n, unit, VectorBytes) for all units of a sample, body.between(n), then
// body.second_pass(n, unit, VectorBytes), with as few samples in flight as keep the threads busy,
// so that the second pass finds its sample in a cache. The order changes no bits.
template <typename Body>
void run_passes(const Body& body, int64_t sample_bytes) {
  constexpr int64_t kWholeBytes = 4 << 20;  // a sample that one thread's caches hold, about
  constexpr int64_t kWaveBytes = 8 << 20;
  const GroupShape& shape = body.shape;
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const bool even = shape.samples % threads == 0 || shape.samples >= 4 * threads;
  if (even && sample_bytes <= kWholeBytes) {
    parallel_dispatch(shape.samples, 1, WholeSamples<Body>{body});
    return;
  }
  const int64_t wave = std::max<int64_t>(1, kWaveBytes / std::max<int64_t>(1, sample_bytes));
  // A task of some 16,000 elements is worth a thread.
  const int64_t unit_size = std::max<int64_t>(1, shape.channels * shape.positions / shape.units);
  const int64_t grain = std::max<int64_t>(1, 16384 / unit_size);
  for (int64_t n = 0; n < shape.samples; n += wave) {
    const int64_t last = std::min(n + wave, shape.samples);
    const int64_t tasks = (last - n) * shape.units;
    parallel_dispatch(tasks, grain, OnePass<Body, false>{body, n});
    for (int64_t i = n; i < last; ++i) {
      body.between(i);
    }
    parallel_dispatch(tasks, grain, OnePass<Body, true>{body, n});
  }
}

}  // namespace ssldiff
