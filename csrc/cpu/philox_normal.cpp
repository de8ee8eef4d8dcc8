// SPDX-License-Identifier: Apache-2.0
// philox_normal and philox4x32 for the CPU; the equations stand in ops/philox_normal.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../checks.h"
#include "dispatch.h"
#include "philox_block.h"

namespace ssldiff {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 256;  // neighbours of one row, drawn by one task
constexpr int64_t kGrain = 16;   // tasks of a thread at least: some 5 microseconds

struct PhiloxNormal {
  float* out;  // [C, rows, W], contiguous
  int64_t rows, width, blocks;
  uint64_t seed;
  int64_t first_row, step;

  template <int kBytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, VectorBytes<kBytes>) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t line = task / blocks;
      const int64_t x = task % blocks * kBlock;
      philox_row<kBytes>(seed, line / rows, first_row + line % rows, x, step,
                         std::min(kBlock, width - x), out + line * width + x);
    }
  }
};

struct Philox4x32 {
  const int64_t* counters;  // [N, 4]
  int64_t* words;           // [N, 4]
  uint64_t seed;

  template <typename Bytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, Bytes) const {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t* c = counters + 4 * n;
      const PhiloxWords drawn =
          philox4x32({static_cast<uint32_t>(c[0]), static_cast<uint32_t>(c[1]),
                      static_cast<uint32_t>(c[2]), static_cast<uint32_t>(c[3])},
                     seed);
      int64_t* w = words + 4 * n;
      w[0] = drawn.w0;
      w[1] = drawn.w1;
      w[2] = drawn.w2;
      w[3] = drawn.w3;
    }
  }
};

void philox_normal(Tensor out, int64_t seed, int64_t first_row, int64_t step) {
  check_noise(out, first_row, step);
  if (out.numel() == 0) {
    return;
  }
  const int64_t blocks = (out.size(2) + kBlock - 1) / kBlock;
  const PhiloxNormal body{static_cast<float*>(out.mutable_data_ptr()),
                          out.size(1),
                          out.size(2),
                          blocks,
                          static_cast<uint64_t>(seed),
                          first_row,
                          step};
  parallel_dispatch(out.size(0) * out.size(1) * blocks, kGrain, body);
}

Tensor philox_words(Tensor counters, int64_t seed) {
  check_counters(counters);
  counters = torch::stable::contiguous(counters);
  Tensor words = torch::stable::new_empty(counters, {counters.size(0), 4});
  if (words.numel() == 0) {
    return words;
  }
  const Philox4x32 body{static_cast<const int64_t*>(counters.const_data_ptr()),
                        static_cast<int64_t*>(words.mutable_data_ptr()),
                        static_cast<uint64_t>(seed)};
  parallel_dispatch(counters.size(0), kGrain * kBlock, body);
  return words;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
  m.impl("philox4x32", TORCH_BOX(&philox_words));
}

}  // namespace
}  // namespace ssldiff
