// SPDX-License-Identifier: Apache-2.0
// The noise of neighbours in one row of the canvas, many at a time; the words and the normal are
// those of include/philox.h to the bit.
//
// GCC vectorises the generator by itself, but packs every product's halves into vectors of 32-bit
// words and takes them apart again for the next product: 11 cycles a normal with AVX-512. Here a
// word stays in the lower half of a 64-bit lane for all ten rounds, and a product costs one
// multiplication, one shift and the exclusive ors: 3 cycles. Box-Muller takes 2 more.
#pragma once

#include <cstdint>

#include "../include/philox.h"
#include "dispatch.h"

namespace ssldiff {

constexpr int kPhiloxBlock = 64;  // neighbours drawn together

#if SSLDIFF_X86

// 64-bit lanes; a word lies in the lower half of each, anything in the upper.
typedef uint64_t Words128 __attribute__((vector_size(16)));
typedef uint64_t Words256 __attribute__((vector_size(32)));
typedef uint64_t Words512 __attribute__((vector_size(64)));

template <int kBytes>
struct PhiloxLanes;

template <>
struct PhiloxLanes<16> {
  using Words = Words128;
};

template <>
struct PhiloxLanes<32> {
  using Words = Words256;
};

template <>
struct PhiloxLanes<64> {
  using Words = Words512;
};

// Products of the lower halves, and a word in every lane.
#if defined(__clang__)
template <typename Words>
SSLDIFF_INLINE Words multiply_halves(Words a, Words b) {
  return (a & 0xffffffffu) * (b & 0xffffffffu);  // recognised
}

template <typename Words>
SSLDIFF_INLINE Words fill(uint32_t word, Words) {
  return Words{} + uint64_t{word};
}
#else
// GCC knows these by name only, and intrinsics may not be called from a body that each path
// compiles anew.
typedef int Ints128 __attribute__((vector_size(16)));
typedef int Ints256 __attribute__((vector_size(32)));
typedef int Ints512 __attribute__((vector_size(64)));
typedef long long Longs128 __attribute__((vector_size(16)));
typedef long long Longs512 __attribute__((vector_size(64)));

SSLDIFF_INLINE Words128 multiply_halves(Words128 a, Words128 b) {
  return (Words128)__builtin_ia32_pmuludq128((Ints128)a, (Ints128)b);
}

SSLDIFF_INLINE Words256 multiply_halves(Words256 a, Words256 b) {
  return (Words256)__builtin_ia32_pmuludq256((Ints256)a, (Ints256)b);
}

SSLDIFF_INLINE Words512 multiply_halves(Words512 a, Words512 b) {
  return (Words512)__builtin_ia32_pmuludq512_mask((Ints512)a, (Ints512)b, Longs512{}, 0xff);
}

SSLDIFF_INLINE Words128 fill(uint32_t word, Words128) { return Words128{word, word}; }

SSLDIFF_INLINE Words256 fill(uint32_t word, Words256) {
  return (Words256)__builtin_ia32_pbroadcastq256((Longs128)fill(word, Words128{}));
}

SSLDIFF_INLINE Words512 fill(uint32_t word, Words512) {
  return (Words512)__builtin_ia32_pbroadcastq512_gpr_mask(word, Longs512{}, 0xff);
}
#endif

// Words of kPhiloxBlock counters (c0, c1, x + i, c3). Vectors of even and of odd neighbours, whose
// words share the lanes of one in the end, go through each round together: one by one they would
// wait for their own products, which lie too far apart for a processor to overlap them.
template <int kBytes>
SSLDIFF_INLINE void philox_words(uint32_t c0, uint32_t c1, uint32_t x, uint32_t c3, uint64_t seed,
                                 uint32_t* words0, uint32_t* words1) {
  using Words = typename PhiloxLanes<kBytes>::Words;
  constexpr int kLanes = kBytes / 8;
  constexpr int kGroup = 4;
  const Words factor0 = fill(0xD2511F53u, Words{});
  const Words factor1 = fill(0xCD9E8D57u, Words{});
  Words first;
  for (int lane = 0; lane < kLanes; ++lane) {
    first[lane] = x + 2 * static_cast<uint64_t>(lane);
  }
  for (int i = 0; i < kPhiloxBlock; i += kGroup * kLanes) {
    Words w0[kGroup], w1[kGroup], w2[kGroup], w3[kGroup];
    for (int g = 0; g < kGroup; ++g) {
      w0[g] = fill(c0, first);
      w1[g] = fill(c1, first);
      w2[g] = first + (g / 2 * 2 * kLanes + g % 2);
      w3[g] = fill(c3, first);
    }
    uint32_t key0 = static_cast<uint32_t>(seed);
    uint32_t key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) {
        const Words product0 = multiply_halves(w0[g], factor0);
        const Words product1 = multiply_halves(w2[g], factor1);
        w0[g] = (product1 >> 32) ^ (w1[g] ^ fill(key0, first));
        w1[g] = product1;
        w2[g] = (product0 >> 32) ^ (w3[g] ^ fill(key1, first));
        w3[g] = product0;
      }
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    for (int g = 0; g < kGroup; g += 2) {
      const Words both0 = (w0[g] & 0xffffffffu) | (w0[g + 1] << 32);
      const Words both1 = (w1[g] & 0xffffffffu) | (w1[g + 1] << 32);
      __builtin_memcpy(words0 + i + g * kLanes, &both0, kBytes);
      __builtin_memcpy(words1 + i + g * kLanes, &both1, kBytes);
    }
    first += kGroup * kLanes;
  }
}

#else

template <int kBytes>
SSLDIFF_INLINE void philox_words(uint32_t c0, uint32_t c1, uint32_t x, uint32_t c3, uint64_t seed,
                                 uint32_t* words0, uint32_t* words1) {
  for (uint32_t i = 0; i < kPhiloxBlock; ++i) {
    const PhiloxWords words = philox4x32({c0, c1, x + i, c3}, seed);
    words0[i] = words.w0;
    words1[i] = words.w1;
  }
}

#endif

// The normals at (channel, y, x .. x + kPhiloxBlock, step), always a whole block: a constant
// length is what the compiler vectorises best.
template <int kBytes>
SSLDIFF_INLINE void philox_block(uint64_t seed, int64_t channel, int64_t y, int64_t x, int64_t step,
                                 float* __restrict normals) {
  alignas(64) uint32_t words0[kPhiloxBlock];
  alignas(64) uint32_t words1[kPhiloxBlock];
  philox_words<kBytes>(static_cast<uint32_t>(channel), static_cast<uint32_t>(y),
                       static_cast<uint32_t>(x), static_cast<uint32_t>(step), seed, words0, words1);
  for (int i = 0; i < kPhiloxBlock; ++i) {
    normals[i] = box_muller(words0[i], words1[i]);
  }
}

// The normals at (channel, y, x .. x + count, step).
template <int kBytes>
SSLDIFF_INLINE void philox_row(uint64_t seed, int64_t channel, int64_t y, int64_t x, int64_t step,
                               int64_t count, float* __restrict normals) {
  int64_t done = 0;
  for (; done + kPhiloxBlock <= count; done += kPhiloxBlock) {
    philox_block<kBytes>(seed, channel, y, x + done, step, normals + done);
  }
  if (done < count) {
    alignas(64) float rest[kPhiloxBlock];
    philox_block<kBytes>(seed, channel, y, x + done, step, rest);
    for (int64_t i = done; i < count; ++i) {
      normals[i] = rest[i - done];
    }
  }
}

}  // namespace ssldiff
