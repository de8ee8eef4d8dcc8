// SPDX-License-Identifier: Apache-2.0
// The schema of every operator, and what the build was made with.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ssldiff, m) {
  m.def(
      "scatter_mean(Tensor windows, int[] origins_y, int[] origins_x, float[] weight_y, "
      "float[] weight_x, int height, int width) -> Tensor");
  m.def("interpolate_grid(Tensor grid, Tensor points, Tensor? valid, str mode) -> Tensor");
  m.def("philox_normal(Tensor(a!) out, int seed, int first_row, int step) -> ()");
  m.def("philox4x32(Tensor counters, int seed) -> Tensor");
  m.def(
      "token_attention(Tensor x, Tensor values, Tensor norm_weight, Tensor norm_bias, "
      "Tensor? keys, Tensor? offsets, int heads, float eps) -> (Tensor, Tensor)");
  m.def("vq_nearest(Tensor z, Tensor codes) -> (Tensor, Tensor)");
}

// SSLDIFF_BUILD_INFO is a JSON object that the build writes; _C.py reads it through ctypes.
extern "C" __attribute__((visibility("default"))) const char* ssldiff_build_info() {
  return SSLDIFF_BUILD_INFO;
}
