// SPDX-License-Identifier: Apache-2.0
// GELU by arithmetic alone, so that compilers vectorise the loops around it and every instruction
// set gives the same bits.
#pragma once

#include <cmath>

#include "dispatch.h"
#include "silu.h"

namespace ssldiff {

// x times the share of the normal distribution below x. That is half of erfc(|x| / sqrt 2) or what
// is left of 1; erfc by Numerical Recipes' rational Chebyshev fit, within 1.2e-7 of its value
// everywhere, so that negative tails keep their digits.
SSLDIFF_INLINE float gelu(float x) {
  constexpr float kRound = 12582912.0f;  // see sigmoid in silu.h
  const float z = std::fabs(x) * 0.70710678118654752f;
  const float t = 1.0f / (1.0f + 0.5f * z);
  float fit = 0.17087277f;
  fit = fit * t - 0.82215223f;
  fit = fit * t + 1.48851587f;
  fit = fit * t - 1.13520398f;
  fit = fit * t + 0.27886807f;
  fit = fit * t - 0.18628806f;
  fit = fit * t + 0.09678418f;
  fit = fit * t + 0.37409196f;
  fit = fit * t + 1.00002368f;
  fit = fit * t - 1.26551223f;
  const float exponent = (fit - z * z) * 1.44269504088896341f;
  const float shifted = exponent + kRound;
  const uint32_t whole = float_to_bits(shifted) << 23;
  const float fraction = exponent - (shifted - kRound);
  const float power = bits_to_float(float_to_bits(power_of_two<float>(fraction)) + whole);
  const float tail = exponent < -125.0f ? 0.0f : 0.5f * t * power;
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

}  // namespace ssldiff
