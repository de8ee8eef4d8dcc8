// SPDX-License-Identifier: Apache-2.0
// The schema of every operator, and what the build was made with.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ssldiff, m) {
  // `geometry` of both: height, width, wrap_y, wrap_x, first row and end of the rows made; of
  // gather_windows: height, width, wrap_y, wrap_x, the window's height and width, first row.
  m.def(
      "scatter_mean(Tensor windows, Tensor? index, Tensor? uncond, Tensor? scale, "
      "Tensor? background, int[] origins_y, int[] origins_x, float[] weight_y, float[] weight_x, "
      "int[] geometry, float guidance_scale, bool normalise) -> Tensor");
  m.def(
      "scatter_mean_step(Tensor windows, Tensor canvas, Tensor? previous, Tensor? index, "
      "Tensor? uncond, Tensor? scale, Tensor? background, int[] origins_y, int[] origins_x, "
      "float[] weight_y, float[] weight_x, int[] geometry, float guidance_scale, "
      "float[] coefficients, int seed, int step) -> (Tensor, Tensor)");
  m.def(
      "gather_windows(Tensor canvas, Tensor index, int[] origins_y, int[] origins_x, "
      "int[] geometry, ScalarType dtype, bool channels_last) -> Tensor");
  m.def(
      "group_norm_silu(Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor? add, "
      "Tensor? scale, Tensor? shift, Tensor? mean, Tensor? rstd, float eps, bool silu) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu_backward(Tensor grad, Tensor x, int groups, Tensor? weight, Tensor? bias, "
      "Tensor? add, Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd, bool given, bool silu) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("group_norm_statistics(Tensor x, int groups) -> (Tensor, Tensor)");
  m.def("interpolate_grid(Tensor grid, Tensor points, Tensor? valid, str mode) -> Tensor");
  m.def("halve(Tensor pixels, float[] weights) -> Tensor");
  m.def(
      "feed_forward(Tensor x, Tensor inward, Tensor bias, Tensor outward, Tensor outward_bias, "
      "Tensor? add) -> Tensor");
  m.def("geglu(Tensor projected) -> Tensor");
  m.def("philox_normal(Tensor(a!) out, int seed, int first_row, int step) -> ()");
  m.def("philox4x32(Tensor counters, int seed) -> Tensor");
  m.def(
      "token_attention(Tensor x, Tensor values, Tensor norm_weight, Tensor norm_bias, "
      "Tensor? keys, Tensor? offsets, int heads, float eps) -> (Tensor, Tensor)");
  m.def("vq_nearest(Tensor z, Tensor codes) -> (Tensor, Tensor)");
  m.def(
      "winograd(Tensor maps, Tensor filters, int out_channels, int zoom, Tensor? bias, Tensor? "
      "add) "
      "-> Tensor");
}

// SSLDIFF_BUILD_INFO is a JSON object that the build writes; _C.py reads it through ctypes.
extern "C" __attribute__((visibility("default"))) const char* ssldiff_build_info() {
  return SSLDIFF_BUILD_INFO;
}
