// SPDX-License-Identifier: Apache-2.0
// One kernel body, compiled for several instruction sets, chosen at run time: one build serves
// every x86-64 machine. On other processors only the portable path exists.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#define SSLDIFF_X86 1
#else
#define SSLDIFF_X86 0
#endif

#define SSLDIFF_INLINE inline __attribute__((always_inline))

namespace ssldiff {

enum class CpuPath : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best path of this processor, or the one that set_cpu_path chose.
CpuPath cpu_path();

// Bytes of a SIMD register on the path that runs, known to the body at compile time.
template <int kBytes>
using VectorBytes = std::integral_constant<int, kBytes>;

#if SSLDIFF_X86
// GCC prefers 256-bit vectors even with AVX-512 unless told; Clang rejects the word.
#if defined(__clang__)
#define SSLDIFF_TARGET_AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#else
#define SSLDIFF_TARGET_AVX512 \
  "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif

template <typename Body>
__attribute__((target("avx2,fma,f16c"))) void run_avx2(const Body& body, int64_t begin,
                                                       int64_t end) {
  body(begin, end, VectorBytes<32>());
}

template <typename Body>
__attribute__((target(SSLDIFF_TARGET_AVX512))) void run_avx512(const Body& body, int64_t begin,
                                                               int64_t end) {
  body(begin, end, VectorBytes<64>());
}
#endif

template <typename Body>
void run_portable(const Body& body, int64_t begin, int64_t end) {
  body(begin, end, VectorBytes<16>());
}

template <typename Body>
void run_on(CpuPath path, const Body& body, int64_t begin, int64_t end) {
#if SSLDIFF_X86
  if (path == CpuPath::kAvx512) {
    run_avx512(body, begin, end);
    return;
  }
  if (path == CpuPath::kAvx2) {
    run_avx2(body, begin, end);
    return;
  }
#endif
  (void)path;
  run_portable(body, begin, end);
}

// Runs body(0, count, VectorBytes) on the calling thread. The body's operator() is SSLDIFF_INLINE,
// so that each path compiles it anew; it must not throw.
template <typename Body>
void dispatch(int64_t count, const Body& body) {
  run_on(cpu_path(), body, 0, count);
}

// The same over parts of [0, count) on torch's thread pool, each of `grain` at least.
template <typename Body>
void parallel_dispatch(int64_t count, int64_t grain, const Body& body) {
  const CpuPath path = cpu_path();
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { run_on(path, body, begin, end); });
}

}  // namespace ssldiff
