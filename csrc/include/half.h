// SPDX-License-Identifier: Apache-2.0
// 16-bit floats as bit patterns, widened to float by integer arithmetic: exact, and vectorised by
// every compiler on every path (GCC does not vectorise conversions from _Float16 before
// AVX512-FP16).
#pragma once

#include <cstdint>
#include <cstring>

namespace ssldiff {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline __attribute__((always_inline)) float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline __attribute__((always_inline)) float widen(float value) { return value; }

inline __attribute__((always_inline)) double widen(double value) { return value; }

inline __attribute__((always_inline)) float widen(BFloat16 value) {
  return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}

// Both branches are computed and one selected, so that the loop around it stays vectorisable.
inline __attribute__((always_inline)) float widen(Float16 value) {
  constexpr uint32_t kExponent = 0x7c00u << 13;
  constexpr uint32_t kRebias = (127u - 15u) << 23;
  const uint32_t magnitude = (static_cast<uint32_t>(value.bits) & 0x7fffu) << 13;
  const uint32_t sign = (static_cast<uint32_t>(value.bits) & 0x8000u) << 16;
  const uint32_t exponent = magnitude & kExponent;
  const uint32_t normal = magnitude + kRebias + (exponent == kExponent ? kRebias : 0u);
  // A subnormal is its 10 bits in units of 2^-24: put them under a known exponent, subtract that.
  const float small = bits_to_float(magnitude + (113u << 23)) - bits_to_float(113u << 23);
  uint32_t subnormal;
  std::memcpy(&subnormal, &small, sizeof(subnormal));
  return bits_to_float(sign | (exponent == 0u ? subnormal : normal));
}

}  // namespace ssldiff
