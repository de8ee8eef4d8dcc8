// SPDX-License-Identifier: Apache-2.0
// Mean and sum of squared deviations of each group, by a method that does not cancel.
#pragma once

#include <cstring>
#include <vector>

#include "group_norm.h"

namespace ssldiff {

struct Moments {
  double count, mean, m2;
};

template <typename T, typename Acc>
struct GroupStatistics {
  static constexpr int kBlock = 8;  // rows whose deviations are from their own mean

  const GroupShape& shape;
  MapPointer<const T> x;
  const Parameter<Acc>& add;  // [N, C]
  std::vector<Moments> partial;

  GroupStatistics(const GroupShape& group_shape, const MapPointer<const T>& maps,
                  const Parameter<Acc>& added)
      : shape(group_shape), x(maps), add(added), partial(shape.samples * per_sample()) {}

  int64_t per_sample() const { return shape.planes() ? shape.units : shape.units * shape.groups; }

  Moments* partials(int64_t n) const {
    return const_cast<Moments*>(partial.data()) + n * per_sample();
  }

  // The moments of x + add over one unit.
  template <int kBytes>
  SSLDIFF_INLINE void measure(int64_t n, int64_t u) const {
    const Unit unit = shape.unit(u);
    const T* data = x.at(n, unit);
    if (shape.planes()) {
      partials(n)[u] = unit.size < kSmallPlane ? planes<kBytes, kFewLanes>(data, n, unit)
                                               : planes<kBytes, kManyLanes>(data, n, unit);
      return;
    }
    std::vector<Acc> sums(2 * shape.channels);
    const int64_t channels = shape.channels;
    lanes<kBytes>(data, x.stride_l, unit.size, channels, sums.data());
    const Acc* added = add.of(n);
    const auto rows = static_cast<double>(unit.size);
    for (int64_t g = 0; g < shape.groups; ++g) {
      Moments moments{};
      double total = 0;
      for (int64_t c = g * shape.group_channels; c < (g + 1) * shape.group_channels; ++c) {
        total += center(data, c, sums.data(), rows) + static_cast<double>(added[c]);
      }
      moments.count = rows * static_cast<double>(shape.group_channels);
      moments.mean = total / static_cast<double>(shape.group_channels);
      for (int64_t c = g * shape.group_channels; c < (g + 1) * shape.group_channels; ++c) {
        const double mean = center(data, c, sums.data(), rows) + static_cast<double>(added[c]);
        const double delta = mean - moments.mean;
        moments.m2 += static_cast<double>(sums[channels + c]) + rows * (delta * delta);
      }
      partials(n)[u * shape.groups + g] = moments;
    }
  }

  // The moments of a whole group from those of its units (Chan, Golub, LeVeque, "Updating formulae
  // and a pairwise algorithm for computing sample variances", 1979).
  SSLDIFF_INLINE Moments group(int64_t n, int64_t g) const {
    const int64_t count = shape.planes() ? shape.units / shape.groups : shape.units;
    const int64_t step = shape.planes() ? 1 : shape.groups;
    const Moments* part = partials(n) + (shape.planes() ? g * count : g);
    Moments all{};
    for (int64_t i = 0; i < count; ++i) {
      all.count += part[i * step].count;
      all.mean += part[i * step].count * part[i * step].mean;
    }
    all.mean /= all.count;
    for (int64_t i = 0; i < count; ++i) {
      const double delta = part[i * step].mean - all.mean;
      all.m2 += part[i * step].m2 + part[i * step].count * (delta * delta);
    }
    return all;
  }

 private:
  SSLDIFF_INLINE static double center(const T* data, int64_t lane, const Acc* sums, double rows) {
    return static_cast<double>(widen(data[lane])) + static_cast<double>(sums[lane]) / rows;
  }

  // A unit of planes fits into the caches, so it is read twice: its mean first, then the deviations
  // from that, whose own mean corrects it (Chan, Golub, LeVeque 1983, equation 1.7).
  template <int kBytes, int64_t kLanes>
  SSLDIFF_INLINE Moments planes(const T* data, int64_t n, const Unit& unit) const {
    const auto count = static_cast<double>(unit.channels * unit.size);
    const Acc* added = add.of(n) + unit.channel;
    LaneSums<kBytes, kLanes> first, second;
    for (int64_t c = 0; c < unit.channels; ++c) {
      first.template add<false>(data + c * x.stride_c, unit.size, -added[c]);
    }
    const Acc pilot = static_cast<Acc>(static_cast<double>(folded<kLanes>(first.total)) / count);
    for (int64_t c = 0; c < unit.channels; ++c) {
      second.template add<true>(data + c * x.stride_c, unit.size, pilot - added[c]);
    }
    const auto rest = static_cast<double>(folded<kLanes>(second.total));
    const auto m2 = static_cast<double>(folded<kLanes>(second.squares));
    return {count, static_cast<double>(pilot) + rest / count, m2 - rest * rest / count};
  }

  template <int64_t kLanes, typename Vectors>
  SSLDIFF_INLINE static Acc folded(const Vectors& vectors) {
    Acc lanes[kLanes];
    std::memcpy(lanes, vectors, sizeof(lanes));
    return fold<kLanes>(lanes);
  }

  // Sums of deviations and of their squares, value i of a plane in lane i % kLanes.
  template <int kBytes, int64_t kLanes>
  struct LaneSums {
    static constexpr int64_t kWidth = kBytes / static_cast<int64_t>(sizeof(Acc));
    static constexpr int64_t kVectors = kLanes / kWidth;

    Vector<Acc, kBytes> total[kVectors] = {}, squares[kVectors] = {};

    template <bool kSquares>
    SSLDIFF_INLINE void add(const T* data, int64_t size, Acc pilot) {
      const Vector<Acc, kBytes> from = repeat<kBytes>(pilot);
      int64_t first = 0;
      for (; first + kLanes <= size; first += kLanes) {
        for (int64_t v = 0; v < kVectors; ++v) {
          const auto d = widen_lanes<kBytes, Acc>(data + first + v * kWidth) - from;
          total[v] += d;
          if constexpr (kSquares) {
            squares[v] += d * d;
          }
        }
      }
      if (first < size) {
        add_rest<kSquares>(data + first, size - first, pilot);
      }
    }

    template <bool kSquares>
    SSLDIFF_INLINE void add_rest(const T* data, int64_t size, Acc pilot) {
      Acc sum[kLanes], square[kLanes];
      std::memcpy(sum, total, sizeof(sum));
      std::memcpy(square, squares, sizeof(square));
      for (int64_t i = 0; i < size; ++i) {
        const Acc d = widen(data[i]) - pilot;
        sum[i] += d;
        if constexpr (kSquares) {
          square[i] += d * d;
        }
      }
      std::memcpy(total, sum, sizeof(sum));
      std::memcpy(squares, square, sizeof(square));
    }
  };

  // Adds to sums [2, lanes] the sum of each lane's distance from its first value, and the sum of
  // its squared deviations from its mean.
  template <int kBytes>
  SSLDIFF_INLINE static void lanes(const T* data, int64_t stride, int64_t rows, int64_t width,
                                   Acc* sums) {
    int64_t row = 0;
    for (; row + kBlock <= rows; row += kBlock) {
      prefetch(data + (row + kBlock) * stride, std::min(kBlock * stride, (rows - row) * stride));
      eight<kBytes>(data, data + row * stride, stride, row, width, sums, sums + width);
    }
    for (; row < rows; ++row) {
      single(data, data + row * stride, row, width, sums, sums + width);
    }
  }

  // So many rows at once are more streams than processors foresee.
  SSLDIFF_INLINE static void prefetch(const T* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(from + i);
    }
  }

  // Eight rows: their own mean and deviations, then Chan's update of all before.
  template <int kBytes>
  SSLDIFF_INLINE static void eight(const T* pilot, const T* block, int64_t stride, int64_t before,
                                   int64_t width, Acc* sum, Acc* m2) {
    constexpr int64_t kWidth = kBytes / static_cast<int64_t>(sizeof(Acc));
    const Acc inverse = before > 0 ? Acc(1) / static_cast<Acc>(before) : Acc(0);
    const Acc share = static_cast<Acc>(before * kBlock) / static_cast<Acc>(before + kBlock);
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) {
      Vector<Acc, kBytes> values[kBlock], total = load_lanes<Acc, kBytes>(sum + i);
      Vector<Acc, kBytes> squares = load_lanes<Acc, kBytes>(m2 + i);
      for (int row = 0; row < kBlock; ++row) {
        values[row] = widen_lanes<kBytes, Acc>(block + row * stride + i);
      }
      update(widen_lanes<kBytes, Acc>(pilot + i), values, inverse, share, total, squares);
      std::memcpy(sum + i, &total, kBytes);
      std::memcpy(m2 + i, &squares, kBytes);
    }
    for (; i < width; ++i) {
      Acc values[kBlock];
      for (int row = 0; row < kBlock; ++row) {
        values[row] = widen(block[row * stride + i]);
      }
      update<Acc>(widen(pilot[i]), values, inverse, share, sum[i], m2[i]);
    }
  }

  // Of one lane, or of a vector of them.
  template <typename Values>
  SSLDIFF_INLINE static void update(Values p, const Values* row, Acc inverse, Acc share,
                                    Values& sum, Values& m2) {
    const Values v0 = row[0] - p, v1 = row[1] - p, v2 = row[2] - p, v3 = row[3] - p;
    const Values v4 = row[4] - p, v5 = row[5] - p, v6 = row[6] - p, v7 = row[7] - p;
    const Values total = ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7));
    const Values mean = total * Acc(0.125);
    const Values d0 = v0 - mean, d1 = v1 - mean, d2 = v2 - mean, d3 = v3 - mean;
    const Values d4 = v4 - mean, d5 = v5 - mean, d6 = v6 - mean, d7 = v7 - mean;
    const Values squares =
        ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7));
    const Values delta = mean - sum * inverse;
    m2 += squares + delta * delta * share;
    sum += total;
  }

  SSLDIFF_INLINE static void single(const T* __restrict pilot, const T* __restrict row,
                                    int64_t before, int64_t width, Acc* __restrict sum,
                                    Acc* __restrict m2) {
    const Acc inverse = before > 0 ? Acc(1) / static_cast<Acc>(before) : Acc(0);
    const Acc share = static_cast<Acc>(before) / static_cast<Acc>(before + 1);
    for (int64_t i = 0; i < width; ++i) {
      const Acc value = widen(row[i]) - widen(pilot[i]);
      const Acc delta = value - sum[i] * inverse;
      m2[i] += delta * delta * share;
      sum[i] += value;
    }
  }
};

}  // namespace ssldiff
