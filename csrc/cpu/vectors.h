// SPDX-License-Identifier: Apache-2.0
// What compilers do not do by themselves: stores past the caches, 16-bit floats by the processor's
// own conversions, and channels laid side by side by two-vector permutations.
//
// Intrinsics may not be called from a body that each path compiles anew, so GCC's builtins stand
// here by name. Every function gives the same bits on every path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../include/half.h"
#include "dispatch.h"

namespace ssldiff {

template <typename Lane, int kBytes>
struct VectorOf {
  typedef Lane type __attribute__((vector_size(kBytes)));
};

template <typename Lane, int kBytes>
using Vector = typename VectorOf<Lane, kBytes>::type;

// An output of this size is in no cache any more when it is read; a store past the caches then
// saves reading each line before it is written.
constexpr int64_t kStreamBytes = 8 << 20;
// Of a cache line.
constexpr int64_t kLineBytes = 64;

// Stores one vector at an address that is a multiple of its size.
template <int kBytes>
SSLDIFF_INLINE void stream_vector(void* to, Vector<long long, kBytes> value) {
#if SSLDIFF_X86 && !defined(__clang__)
  if constexpr (kBytes == 64) {
    __builtin_ia32_movntdq512(static_cast<Vector<long long, 64>*>(to), value);
  } else if constexpr (kBytes == 32) {
    __builtin_ia32_movntdq256(static_cast<Vector<long long, 32>*>(to), value);
  } else {
    __builtin_ia32_movntdq(static_cast<Vector<long long, 16>*>(to), value);
  }
#elif defined(__clang__)
  __builtin_nontemporal_store(value, static_cast<Vector<long long, kBytes>*>(to));
#else
  std::memcpy(to, &value, kBytes);
#endif
}

// Before other threads read what was streamed.
SSLDIFF_INLINE void stream_fence() {
#if SSLDIFF_X86
  __builtin_ia32_sfence();
#endif
}

// Stores one vector, past the caches where the caller found whole lines.
template <int kBytes, typename Values>
SSLDIFF_INLINE void store_vector(void* to, Values value, bool streams) {
  if (streams) {
    stream_vector<kBytes>(to, (Vector<long long, kBytes>)value);
  } else {
    std::memcpy(to, &value, kBytes);
  }
}

template <typename Lane, int kBytes>
SSLDIFF_INLINE Vector<Lane, kBytes> load_lanes(const void* from) {
  Vector<Lane, kBytes> lanes;
  std::memcpy(&lanes, from, kBytes);
  return lanes;
}

template <typename Lane, int kBytes>
SSLDIFF_INLINE Vector<Lane, 2 * kBytes> join(const Vector<Lane, kBytes>& low,
                                             const Vector<Lane, kBytes>& high) {
  Vector<Lane, 2 * kBytes> both;
  std::memcpy(&both, &low, kBytes);
  std::memcpy(reinterpret_cast<char*>(&both) + kBytes, &high, kBytes);
  return both;
}

// One element to another type, by arithmetic.
template <typename From, typename To>
SSLDIFF_INLINE To cast_one(From value) {
  if constexpr (std::is_same_v<From, To>) {
    return value;
  } else {
    return narrow<To>(static_cast<float>(widen(value)));
  }
}

template <typename From, typename To>
SSLDIFF_INLINE void cast_row(const From* __restrict from, To* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = cast_one<From, To>(from[i]);
  }
}

// Lanes kLane of two vectors one after the other.
#if defined(__clang__)
template <int... kLane, typename Values>
SSLDIFF_INLINE Values permute(Values a, Values b) {
  return __builtin_shufflevector(a, b, kLane...);
}
#else
template <int... kLane, typename Values>
SSLDIFF_INLINE Values permute(Values a, Values b) {
  return __builtin_shuffle(a, b, Values{kLane...});
}
#endif

// Lanes 1, 3, 5 ... of two vectors: the upper halves of twice as wide ones.
template <typename Values, size_t... kLane>
SSLDIFF_INLINE Values upper_halves(Values a, Values b, std::index_sequence<kLane...>) {
  return permute<static_cast<int>(2 * kLane + 1)...>(a, b);
}

// narrow<BFloat16> of each lane, in its upper half.
template <int kBytes>
SSLDIFF_INLINE Vector<uint16_t, kBytes> bfloat16_lanes(Vector<float, kBytes> value) {
  const auto bits = (Vector<uint32_t, kBytes>)value;
  const Vector<uint32_t, kBytes> rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Vector<uint32_t, kBytes> nan = Vector<uint32_t, kBytes>{} + 0x7fc00000u;
  return (Vector<uint16_t, kBytes>)(value != value ? nan : rounded);
}

#if SSLDIFF_X86 && !defined(__clang__)
// narrow<Float16> of as many floats as a vector holds.
template <int kBytes>
SSLDIFF_INLINE Vector<uint16_t, kBytes / 2> float16_lanes(Vector<float, kBytes> value) {
  // The processor keeps what a NaN holds; we keep its sign alone.
  const auto sign = (Vector<uint32_t, kBytes>)value & 0x80000000u;
  const Vector<uint32_t, kBytes> nan = sign | 0x7fc00000u;
  const auto kept = (Vector<float, kBytes>)(value != value ? nan : (Vector<uint32_t, kBytes>)value);
  if constexpr (kBytes == 64) {
    return (Vector<uint16_t, 32>)__builtin_ia32_vcvtps2ph512_mask(kept, 0, Vector<short, 32>{},
                                                                  0xffff);
  } else {
    return (Vector<uint16_t, 16>)__builtin_ia32_vcvtps2ph256(kept, 0);
  }
}
#endif

// widen(Float16) of as many values as a vector of floats holds.
template <int kBytes>
SSLDIFF_INLINE Vector<uint32_t, kBytes> widened_lanes(const Float16* from) {
  using Words = Vector<uint32_t, kBytes>;
  const Words bits = __builtin_convertvector((load_lanes<uint16_t, kBytes / 2>(from)), Words);
  const Words exponent = (bits & 0x7c00u) << 13;
  const Words magnitude = (bits & 0x7fffu) << 13;
  const Words above = exponent == 0x7c00u << 13 ? Words{} + (112u << 23) : Words{};
  const Words normal = magnitude + (112u << 23) + above;
  const auto small = (Words)((Vector<float, kBytes>)(magnitude + (113u << 23)) -
                             (Vector<float, kBytes>)(Words{} + (113u << 23)));
  return ((bits & 0x8000u) << 16) | (exponent == 0u ? small : normal);
}

// Bits of an element, as an integer.
template <typename T>
using LaneOf = std::conditional_t<sizeof(T) == 2, uint16_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// One value in every lane, by its bits: of a list of lanes GCC makes one masked move each, and a
// sum with zero would lose the sign of another zero.
template <int kBytes, typename Lane>
SSLDIFF_INLINE Vector<Lane, kBytes> repeat(Lane value) {
  LaneOf<Lane> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (Vector<Lane, kBytes>)(Vector<LaneOf<Lane>, kBytes>{} + bits);
}

// widen of as many elements as a vector of Acc holds; a signalling NaN may come out quiet.
template <int kBytes, typename Acc, typename T>
SSLDIFF_INLINE Vector<Acc, kBytes> widen_lanes(const T* from) {
  if constexpr (std::is_same_v<T, Acc>) {
    return load_lanes<Acc, kBytes>(from);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const auto bits = load_lanes<uint16_t, kBytes / 2>(from);
    using Words = Vector<uint32_t, kBytes>;
    return (Vector<float, kBytes>)(__builtin_convertvector(bits, Words) << 16);
#if SSLDIFF_X86 && !defined(__clang__)
  } else if constexpr (kBytes == 64) {
    return __builtin_ia32_vcvtph2ps512_mask(load_lanes<short, 32>(from), Vector<float, 64>{},
                                            0xffff, 4);
  } else if constexpr (kBytes == 32) {
    return __builtin_ia32_vcvtph2ps256(load_lanes<short, 16>(from));
#endif
  } else {
    return (Vector<float, kBytes>)widened_lanes<kBytes>(from);
  }
}

// narrow<T> of a vector's worth of elements, from sizeof(Acc) / sizeof(T) vectors.
template <int kBytes, typename T, typename Acc>
SSLDIFF_INLINE Vector<LaneOf<T>, kBytes> narrow_lanes(const Vector<Acc, kBytes>* wide) {
  constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));
  if constexpr (std::is_same_v<T, Acc>) {
    return (Vector<LaneOf<T>, kBytes>)wide[0];
  } else if constexpr (std::is_same_v<T, BFloat16> && kBytes > 16) {
    return upper_halves(bfloat16_lanes<kBytes>(wide[0]), bfloat16_lanes<kBytes>(wide[1]),
                        std::make_index_sequence<kLanes>());
#if SSLDIFF_X86 && !defined(__clang__)
  } else if constexpr (std::is_same_v<T, Float16> && kBytes > 16) {
    return join<uint16_t, kBytes / 2>(float16_lanes<kBytes>(wide[0]),
                                      float16_lanes<kBytes>(wide[1]));
#endif
  } else {
    Acc values[kLanes];
    T made[kLanes];
    std::memcpy(values, wide, sizeof(values));
    cast_row(values, made, kLanes);
    return load_lanes<LaneOf<T>, kBytes>(made);
  }
}

// As many elements as a vector of To holds, cast.
template <int kBytes, typename From, typename To>
SSLDIFF_INLINE Vector<LaneOf<To>, kBytes> cast_lanes(const From* from) {
  constexpr int kLanes = kBytes / static_cast<int>(sizeof(To));
  if constexpr (std::is_same_v<From, To>) {
    return load_lanes<LaneOf<To>, kBytes>(from);
  } else if constexpr (std::is_same_v<From, float> && sizeof(To) == 2) {
    const Vector<float, kBytes> wide[] = {load_lanes<float, kBytes>(from),
                                          load_lanes<float, kBytes>(from + kLanes / 2)};
    return narrow_lanes<kBytes, To, float>(wide);
  } else if constexpr (std::is_same_v<From, Float16> && std::is_same_v<To, float>) {
    return widened_lanes<kBytes>(from);
  } else {
    To made[kLanes];
    cast_row(from, made, kLanes);
    return load_lanes<LaneOf<To>, kBytes>(made);
  }
}

// Where lane `lane` of vector `out` of kChannels interleaved ones comes from, when channel `step`
// joins those before it.
template <int kChannels, int kLanes>
constexpr int interleaved_from(int out, int step, int lane) {
  const int element = out * kLanes + lane;
  const int channel = element % kChannels, pixel = element / kChannels;
  return channel == step ? kLanes + pixel : step == 1 && channel == 0 ? pixel : lane;
}

template <int kChannels, int kOut, int kStep, typename Values, size_t... kLane>
SSLDIFF_INLINE Values join_channel(Values joined, Values channel, std::index_sequence<kLane...>) {
  constexpr int kLanes = static_cast<int>(sizeof...(kLane));
  return permute<interleaved_from<kChannels, kLanes>(kOut, kStep, static_cast<int>(kLane))...>(
      joined, channel);
}

template <int kChannels, int kOut, typename Values, size_t... kStep>
SSLDIFF_INLINE Values join_channels(const Values* channels, std::index_sequence<kStep...>) {
  constexpr size_t kLanes = sizeof(Values) / sizeof(channels[0][0]);
  Values joined = channels[0];
  ((joined = join_channel<kChannels, kOut, static_cast<int>(kStep) + 1>(
        joined, channels[kStep + 1], std::make_index_sequence<kLanes>())),
   ...);
  return joined;
}

// Vectors of kChannels channels as kChannels vectors of pixels.
template <int kBytes, int kChannels, typename Values, size_t... kOut>
SSLDIFF_INLINE void store_interleaved(const Values* channels, char* to, bool streams,
                                      std::index_sequence<kOut...>) {
  (store_vector<kBytes>(
       to + kOut * kBytes,
       join_channels<kChannels, kOut>(channels, std::make_index_sequence<kChannels - 1>()),
       streams),
   ...);
}

}  // namespace ssldiff
