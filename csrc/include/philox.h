// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al. 2011) and the normal made of its first two words by Box-Muller.
// Shared by host and device; knows no torch. Every step of the normal is one correctly rounded
// float32 operation, so that processors and GPUs give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SSLDIFF_PHILOX_INLINE __host__ __device__ __forceinline__
#else
#define SSLDIFF_PHILOX_INLINE inline __attribute__((always_inline))
#endif

namespace ssldiff {

// The four words of a counter, or of what comes of it.
struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

SSLDIFF_PHILOX_INLINE PhiloxWords philox4x32(PhiloxWords c, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c.w0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c.w2;
    c = {static_cast<uint32_t>(product1 >> 32) ^ c.w1 ^ key0, static_cast<uint32_t>(product1),
         static_cast<uint32_t>(product0 >> 32) ^ c.w3 ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// On a GPU a * b + c would become one fused operation, which rounds once instead of twice.
SSLDIFF_PHILOX_INLINE float times(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

SSLDIFF_PHILOX_INLINE float plus(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// -log(n / 2^24) for n from 1 to 2^24: n = 2^e m with m from sqrt(1/2) to sqrt(2), and
// log(m) = 2 atanh(s) with s = (m - 1) / (m + 1), by its series to s^9 (the rest is below 2e-9).
SSLDIFF_PHILOX_INLINE float minus_log(uint32_t n) {
  constexpr uint32_t kOne = 0x3f800000u;
  constexpr uint32_t kRootHalf = 0x3f3504f3u;
  const float whole = static_cast<float>(static_cast<int32_t>(n));
  uint32_t bits;
  std::memcpy(&bits, &whole, sizeof(bits));
  bits += kOne - kRootHalf;
  const float e = static_cast<float>(static_cast<int32_t>(bits >> 23) - (127 + 24));
  bits = (bits & 0x007fffffu) + kRootHalf;
  float m;
  std::memcpy(&m, &bits, sizeof(m));
  const float s = plus(m, -1.0f) / plus(m, 1.0f);
  const float z = times(s, s);
  float series = plus(times(z, 1.0f / 9), 1.0f / 7);
  series = plus(times(z, series), 1.0f / 5);
  series = plus(times(z, series), 1.0f / 3);
  // log(2) in two parts: e times the first is exact.
  const float small = plus(times(times(times(2.0f, s), z), series), times(e, 1.42860677e-6f));
  return -plus(times(e, 0.693145752f), plus(times(2.0f, s), small));
}

// cos(2 pi n / 2^24) for n below 2^24: the quarter turn by whole numbers, the rest r, at most an
// eighth of a turn to either side, by the series of sine and cosine.
SSLDIFF_PHILOX_INLINE float cos_turn(uint32_t n) {
  constexpr uint32_t kEighth = 1u << 21;
  const uint32_t shifted = n + kEighth;
  const uint32_t quarter = shifted >> 22;
  const int32_t rest = static_cast<int32_t>(shifted & 0x003fffffu) - static_cast<int32_t>(kEighth);
  const float r = times(static_cast<float>(rest), 3.74507039e-7f);  // 2 pi / 2^24
  const float z = times(r, r);
  float sine = plus(times(z, 2.75573192e-6f), -1.98412698e-4f);
  sine = plus(times(z, sine), 8.33333333e-3f);
  sine = plus(times(z, sine), -0.166666667f);
  sine = plus(r, times(times(r, z), sine));
  float cosine = plus(times(z, -2.75573192e-7f), 2.48015873e-5f);
  cosine = plus(times(z, cosine), -1.38888889e-3f);
  cosine = plus(times(z, cosine), 4.16666667e-2f);
  cosine = plus(times(z, cosine), -0.5f);
  cosine = plus(times(z, cosine), 1.0f);
  // cos(r), -sin(r), -cos(r), sin(r)
  const float value = (quarter & 1u) != 0 ? sine : cosine;
  return ((quarter + 1u) & 2u) != 0 ? -value : value;
}

// The upper 24 bits of a word are exact in float32. The radius draws from (0, 1], so that its
// logarithm is finite.
SSLDIFF_PHILOX_INLINE float box_muller(uint32_t word0, uint32_t word1) {
  const float squared = times(2.0f, minus_log((word0 >> 8) + 1u));
#if defined(__CUDA_ARCH__)
  const float radius = __fsqrt_rn(squared);
#else
  const float radius = std::sqrt(squared);
#endif
  return times(radius, cos_turn(word1 >> 8));
}

// The normal at a coordinate of the canvas; counters beyond 2^32 are refused before.
SSLDIFF_PHILOX_INLINE float philox_normal_at(uint64_t seed, int64_t channel, int64_t y, int64_t x,
                                             int64_t step) {
  const PhiloxWords words = philox4x32({static_cast<uint32_t>(channel), static_cast<uint32_t>(y),
                                        static_cast<uint32_t>(x), static_cast<uint32_t>(step)},
                                       seed);
  return box_muller(words.w0, words.w1);
}

}  // namespace ssldiff
