// SPDX-License-Identifier: Apache-2.0
// Half of an image along both axes, for the next level of its pyramid. One thread: who calls it has
// a tile for each of theirs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "dispatch.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Every second pixel of a line. A pixel of three bytes is moved as four, whose last is overwritten
// by the next pixel; `to` has room for one more.
template <int kBands>
SSLDIFF_INLINE void take_every_second(const uint8_t* line, uint8_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * kBands, line + 2 * i * kBands, 4);
  }
}

// The mean of 2x2 pixels, rounded to nearest; an odd last row or column is repeated.
template <int kBands>
struct Box {
  const uint8_t* pixels;  // [h, w, kBands], rows `pitch` bytes apart
  uint8_t* out;           // [(h + 1) / 2, (w + 1) / 2, kBands]
  int64_t height, width, pitch;

  template <typename Bytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, Bytes) const {
    const int64_t half = (width + 1) / 2, line = width * kBands;
    // Sums of every pixel with its right neighbour are made, and every second is taken: that is
    // faster than strided sums.
    std::vector<uint16_t> sums(2 * half * kBands + kBands);
    std::vector<uint8_t> means(2 * half * kBands + 4), taken(half * kBands + 4);
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* above = pixels + 2 * row * pitch;
      const uint8_t* below = 2 * row + 1 < height ? above + pitch : above;
      for (int64_t i = 0; i < line; ++i) {
        sums[i] = static_cast<uint16_t>(above[i] + below[i]);
      }
      if (width % 2) {
        std::copy_n(sums.data() + line - kBands, kBands, sums.data() + line);
      }
      for (int64_t i = 0; i < 2 * half * kBands; ++i) {
        means[i] = static_cast<uint8_t>((sums[i] + sums[i + kBands] + 2) >> 2);
      }
      take_every_second<kBands>(means.data(), taken.data(), half);
      std::memcpy(out + row * half * kBands, taken.data(), half * kBands);
    }
  }
};

// Weighted sums of 2 + 2 reach pixels along each axis, rounded to nearest even and cut off to eight
// bits. Terms are added one after the other in float32, so that a pixel is the same whatever piece
// it is made in.
template <int kBands>
struct Weighted {
  const uint8_t* pixels;  // [2 m + taps - 2, 2 n + taps - 2, kBands], rows `pitch` bytes apart
  uint8_t* out;           // [m, n, kBands]
  const float* weights;
  int64_t taps, width, half, pitch;

  template <typename Bytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, Bytes) const {
    const int64_t line = width * kBands, made = 2 * half * kBands;
    std::vector<float> down(line + kBands), across(made);
    std::vector<uint8_t> bytes(made + 4), taken(half * kBands + 4);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        add(pixels + (2 * row + tap) * pitch, weights[tap], tap == 0, line, down.data());
      }
      // The last of these, which is not taken, reads one pixel more.
      for (int64_t tap = 0; tap < taps; ++tap) {
        add(down.data() + tap * kBands, weights[tap], tap == 0, made, across.data());
      }
      for (int64_t i = 0; i < made; ++i) {
        // Adding 1.5 * 2^23 rounds to nearest even, which is what is left in the lowest bits.
        const float cut = std::min(std::max(across[i], 0.0f), 255.0f) + 12582912.0f;
        uint32_t bits;
        std::memcpy(&bits, &cut, 4);
        bytes[i] = static_cast<uint8_t>(bits);
      }
      take_every_second<kBands>(bytes.data(), taken.data(), half);
      std::memcpy(out + row * half * kBands, taken.data(), half * kBands);
    }
  }

  template <typename T>
  SSLDIFF_INLINE static void add(const T* from, float weight, bool first, int64_t count,
                                 float* __restrict to) {
    if (first) {
      for (int64_t i = 0; i < count; ++i) {
        to[i] = static_cast<float>(from[i]) * weight;
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        to[i] += static_cast<float>(from[i]) * weight;
      }
    }
  }
};

template <int kBands>
void launch(const Tensor& pixels, const Tensor& out, const std::vector<float>& weights) {
  const auto* from = static_cast<const uint8_t*>(pixels.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t rows = out.size(0), pitch = pixels.stride(0);
  if (weights.empty()) {
    dispatch(rows, Box<kBands>{from, to, pixels.size(0), pixels.size(1), pitch});
  } else {
    const auto taps = static_cast<int64_t>(weights.size());
    dispatch(rows,
             Weighted<kBands>{from, to, weights.data(), taps, pixels.size(1), out.size(1), pitch});
  }
}

Tensor halve(Tensor pixels, std::vector<double> weights) {
  STD_TORCH_CHECK(pixels.scalar_type() == ScalarType::Byte && pixels.dim() == 3 &&
                      (pixels.size(2) == 3 || pixels.size(2) == 4) && pixels.stride(2) == 1 &&
                      pixels.stride(1) == pixels.size(2),
                  "halve: pixels must be uint8 [h, w, 3] or [h, w, 4], each row contiguous.");
  const auto taps = static_cast<int64_t>(weights.size());
  int64_t sizes[] = {(pixels.size(0) + 1) / 2, (pixels.size(1) + 1) / 2};
  if (taps > 0) {
    STD_TORCH_CHECK(taps % 2 == 0 && pixels.size(0) >= taps && pixels.size(1) >= taps &&
                        pixels.size(0) % 2 == 0 && pixels.size(1) % 2 == 0,
                    "halve: with weights, whose number must be even, the sides of pixels must be "
                    "even and no shorter, but there are ",
                    taps, " weights for ", pixels.size(0), " x ", pixels.size(1), " pixels.");
    for (int64_t& size : sizes) {
      size -= taps / 2 - 1;
    }
  }
  Tensor out = torch::stable::new_empty(pixels, {sizes[0], sizes[1], pixels.size(2)});
  if (out.numel() > 0) {
    const std::vector<float> rounded(weights.begin(), weights.end());
    if (pixels.size(2) == 3) {
      launch<3>(pixels, out, rounded);
    } else {
      launch<4>(pixels, out, rounded);
    }
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) { m.impl("halve", TORCH_BOX(&halve)); }

}  // namespace
}  // namespace ssldiff
