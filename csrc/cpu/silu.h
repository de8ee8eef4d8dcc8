// SPDX-License-Identifier: Apache-2.0
// SiLU and its slope by arithmetic alone, so that compilers vectorise the loops around them and
// every instruction set gives the same bits (a call of expf does neither).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../include/half.h"
#include "dispatch.h"
#include "vectors.h"

namespace ssldiff {

// Bits of a float and back, and of each float of a vector.
template <typename Bits, typename Values>
SSLDIFF_INLINE Bits same_bits(Values values) {
  Bits bits;
  std::memcpy(&bits, &values, sizeof(bits));
  return bits;
}

template <typename Values>
struct BitsOf;

template <>
struct BitsOf<float> {
  using type = uint32_t;
};

#define SSLDIFF_BITS_OF(kBytes)            \
  template <>                              \
  struct BitsOf<Vector<float, kBytes>> {   \
    using type = Vector<uint32_t, kBytes>; \
  };
SSLDIFF_BITS_OF(16)
SSLDIFF_BITS_OF(32)
SSLDIFF_BITS_OF(64)
#undef SSLDIFF_BITS_OF

// 2^f for |f| <= 0.5 by minimax polynomials: within 8e-8 for results T in float, within 3e-6 for
// float16, which rounds by 2e-4, and within 1e-4 for bfloat16, which rounds by 2e-3.
template <typename T, typename Values>
SSLDIFF_INLINE Values power_of_two(Values f) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return ((5.517166906e-2f * f + 2.426111222e-1f) * f + 6.932609855e-1f) * f + 9.999280735e-1f;
  } else if constexpr (std::is_same_v<T, Float16>) {
    return (((9.570082344e-3f * f + 5.591802464e-2f) * f + 2.402474651e-1f) * f + 6.931217947e-1f) *
               f +
           9.999992606e-1f;
  } else {
    return ((((1.327644881e-3f * f + 9.675564158e-3f) * f + 5.550713516e-2f) * f +
             2.402211930e-1f) *
                f +
            6.931469668e-1f) *
               f +
           1.000000072f;
  }
}

// 1 + e^-z of a float or a vector of floats, for results T; infinite below -87 and 1 above 87. NaN
// gives an arbitrary number.
template <typename T, typename Values>
SSLDIFF_INLINE Values one_plus_exponential(Values z) {
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
  constexpr float kRound = 12582912.0f;
  using Bits = typename BitsOf<Values>::type;
  const Values t = z * -1.44269504088896341f;
  const Values shifted = t + kRound;
  const Values mantissa = power_of_two<T>(t - (shifted - kRound));
  const Values power =
      same_bits<Values>(same_bits<Bits>(mantissa) + (same_bits<Bits>(shifted) << 23));
  const Values inside = 1.0f + power;
  // Chosen last: of a value limited first, compilers make a branch, and the loop around a branch
  // is not vectorised.
  const Values none{};
  const Values below = z < -87.0f ? none + std::numeric_limits<float>::infinity() : inside;
  return z > 87.0f ? none + 1.0f : below;
}

template <typename T>
SSLDIFF_INLINE double one_plus_exponential(double z) {
  return 1.0 + std::exp(-z);
}

// T is the type that the result is stored in; z may be a vector of floats. (One division costs no
// more than a reciprocal by Newton's method: measured, on Zen 5, 20 % less in all.)
template <typename T, typename Values>
SSLDIFF_INLINE Values silu(Values z) {
  return z / one_plus_exponential<T>(z);
}

template <typename T, typename Acc>
SSLDIFF_INLINE Acc silu_slope(Acc z) {
  const Acc s = Acc(1) / one_plus_exponential<T>(z);
  return s * (Acc(1) + z * (Acc(1) - s));
}

}  // namespace ssldiff
