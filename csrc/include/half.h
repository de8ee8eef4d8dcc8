// SPDX-License-Identifier: Apache-2.0
// 16-bit floats as bit patterns, widened and rounded by integer arithmetic: exact, and vectorised
// by every compiler on every path (GCC does not vectorise conversions from _Float16 before
// AVX512-FP16).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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

inline __attribute__((always_inline)) uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Rounded to nearest, ties to even, NaN kept; from the type that sums are made in.
template <typename T>
inline __attribute__((always_inline)) T narrow(T value) {
  return value;
}

template <typename T>
inline __attribute__((always_inline)) std::enable_if_t<std::is_same<T, BFloat16>::value, T> narrow(
    float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

template <typename T>
inline __attribute__((always_inline)) std::enable_if_t<std::is_same<T, Float16>::value, T> narrow(
    float value) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Added to 0.5, whose last bit is 2^-24, a subnormal's bits come out as an integer.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  uint32_t result = magnitude < (113u << 23) ? subnormal : rounded;
  result = magnitude >= (143u << 23) || result > 0x7c00u ? 0x7c00u : result;
  result = magnitude > kInfinity ? 0x7e00u : result;
  return {static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u))};
}

}  // namespace ssldiff
