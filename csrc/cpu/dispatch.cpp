// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace ssldiff {
namespace {

CpuPath best_path() {
#if SSLDIFF_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return CpuPath::kAvx512;
    }
    return CpuPath::kAvx2;
  }
#endif
  return CpuPath::kPortable;
}

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

std::atomic<CpuPath>& chosen_path() {
  static std::atomic<CpuPath> path{best_path()};
  return path;
}

}  // namespace

CpuPath cpu_path() { return chosen_path().load(std::memory_order_relaxed); }

}  // namespace ssldiff

// Plain C, called through ctypes by _C.py.
extern "C" __attribute__((visibility("default"))) const char* ssldiff_cpu_path() {
  return ssldiff::kNames[static_cast<int>(ssldiff::cpu_path())];
}

// Chooses a path by name ("best" for this processor's own). Returns 0 if it cannot run here.
extern "C" __attribute__((visibility("default"))) int ssldiff_set_cpu_path(const char* name) {
  using ssldiff::CpuPath;
  const CpuPath best = ssldiff::best_path();
  if (std::strcmp(name, "best") == 0) {
    ssldiff::chosen_path() = best;
    return 1;
  }
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::strcmp(name, ssldiff::kNames[i]) == 0) {
      ssldiff::chosen_path() = static_cast<CpuPath>(i);
      return 1;
    }
  }
  return 0;
}
