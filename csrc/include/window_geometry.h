// SPDX-License-Identifier: Apache-2.0
// Which windows of a separable lattice cover a position of the canvas. Shared by host and device;
// knows no torch, so that its index arithmetic is tested without a GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SSLDIFF_HOST_DEVICE __host__ __device__
#else
#define SSLDIFF_HOST_DEVICE
#endif

namespace ssldiff {

// A half-open range of indices.
struct Range {
  int64_t begin;
  int64_t end;
};

// Index of the first of `count` ascending origins that lies beyond `position`.
SSLDIFF_HOST_DEVICE inline int64_t origins_up_to(const int64_t* origins, int64_t count,
                                                 int64_t position) {
  int64_t low = 0;
  int64_t high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (origins[middle] <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The windows of one axis that cover at least one position of [first, last].
SSLDIFF_HOST_DEVICE inline Range windows_covering(const int64_t* origins, int64_t count,
                                                  int64_t window, int64_t first, int64_t last) {
  return {origins_up_to(origins, count, first - window), origins_up_to(origins, count, last)};
}

}  // namespace ssldiff
