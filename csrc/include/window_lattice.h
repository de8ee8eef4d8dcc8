// SPDX-License-Identifier: Apache-2.0
// The host's side of a separable lattice of windows: which of them cover a band of the canvas, and
// where each lies in the batch that was given. Knows no torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "window_geometry.h"

namespace ssldiff {

// One axis of a lattice.
struct LatticeAxis {
  const std::vector<int64_t>& origins;  // ascending
  int64_t window, size;
  bool wraps;  // windows that run over the end go on at the beginning
};

// The windows of one axis that cover at least one position of a range, by ascending origin. A
// window that wraps and covers the range past the border counts there with its origin less the
// size of the axis, so that what follows knows no wrapping.
struct AxisWindows {
  std::vector<int64_t> origins;
  std::vector<int64_t> numbers;  // in the lattice

  int64_t count() const { return static_cast<int64_t>(origins.size()); }
};

inline AxisWindows axis_windows(const LatticeAxis& axis, Range positions) {
  AxisWindows found;
  const int64_t count = static_cast<int64_t>(axis.origins.size());
  for (const int64_t lap : {axis.size, int64_t{0}}) {
    if (lap != 0 && !axis.wraps) {
      continue;
    }
    const Range covering = windows_covering(axis.origins.data(), count, axis.window,
                                            positions.begin + lap, positions.end - 1 + lap);
    for (int64_t i = covering.begin; i < covering.end; ++i) {
      found.origins.push_back(axis.origins[i] - lap);
      found.numbers.push_back(i);
    }
  }
  return found;
}

// sum_k a(x - o_k) for every position of a range; the normaliser of the whole lattice is the
// product of two of these, because lattice and weights are separable.
template <typename Acc>
std::vector<Acc> axis_norm(const AxisWindows& windows, const std::vector<Acc>& weight,
                           Range positions) {
  std::vector<Acc> norm(positions.end - positions.begin, Acc(0));
  for (const int64_t origin : windows.origins) {
    const int64_t first = std::max(origin, positions.begin);
    const int64_t last = std::min(origin + static_cast<int64_t>(weight.size()), positions.end);
    for (int64_t x = first; x < last; ++x) {
      norm[x - positions.begin] += weight[x - origin];
    }
  }
  return norm;
}

// Where in the batch each window of rows x columns lies, row-major; -1: it was left out. `index`
// holds the ascending numbers of the windows given, null: all of them.
inline std::vector<int64_t> window_slots(const AxisWindows& rows, const AxisWindows& columns,
                                         int64_t lattice_columns, const int64_t* index,
                                         int64_t given) {
  std::vector<int64_t> slots;
  slots.reserve(rows.numbers.size() * columns.numbers.size());
  for (const int64_t row : rows.numbers) {
    const int64_t first = row * lattice_columns;
    if (index == nullptr) {
      for (const int64_t column : columns.numbers) {
        slots.push_back(first + column);
      }
      continue;
    }
    const int64_t* begin = std::lower_bound(index, index + given, first);
    const int64_t* end = std::lower_bound(begin, index + given, first + lattice_columns);
    const bool whole = end - begin == lattice_columns;
    for (const int64_t column : columns.numbers) {
      const int64_t* at = whole ? begin + column : std::lower_bound(begin, end, first + column);
      slots.push_back(at != end && *at == first + column ? at - index : -1);
    }
  }
  return slots;
}

}  // namespace ssldiff
