// SPDX-License-Identifier: Apache-2.0
// Which four cells of a grid surround a point, and how much of each it takes. Shared by host and
// device; knows no torch. The equations stand in ops/interpolate_grid.py.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SSLDIFF_GRID_INLINE __host__ __device__ __forceinline__
#else
#define SSLDIFF_GRID_INLINE inline __attribute__((always_inline))
#endif

namespace ssldiff {

enum class GridMode : int { kBilinear = 0, kSlerp = 1, kNearest = 2 };

// Upper left, upper right, lower left, lower right.
template <typename Acc>
struct GridCorners {
  int64_t cells[4];  // indices in the flattened grid
  bool there[4];     // valid
  Acc y, x;          // shares of the lower row and of the right column
};

// Coordinate on an axis of `size` cells; beyond the outer cells and NaN: replicated.
SSLDIFF_GRID_INLINE double clamp_to_axis(double point, int64_t size) {
  const double limit = static_cast<double>(size - 1);
  return point > 0.0 ? (point < limit ? point : limit) : 0.0;
}

template <typename Acc>
SSLDIFF_GRID_INLINE GridCorners<Acc> grid_corners(const double* point, int64_t rows,
                                                  int64_t columns, const bool* valid) {
  const double y = clamp_to_axis(point[0], rows);
  const double x = clamp_to_axis(point[1], columns);
  const int64_t top = static_cast<int64_t>(y);
  const int64_t left = static_cast<int64_t>(x);
  const int64_t bottom = top + 1 < rows ? top + 1 : top;
  const int64_t right = left + 1 < columns ? left + 1 : left;
  GridCorners<Acc> corners{{top * columns + left, top * columns + right, bottom * columns + left,
                            bottom * columns + right},
                           {true, true, true, true},
                           static_cast<Acc>(y - static_cast<double>(top)),
                           static_cast<Acc>(x - static_cast<double>(left))};
  if (valid != nullptr) {
    for (int i = 0; i < 4; ++i) {
      corners.there[i] = valid[corners.cells[i]];
    }
  }
  return corners;
}

template <typename Acc>
struct GridWeights {
  Acc w[4];  // 0: the cell takes no part
};

template <typename Acc>
SSLDIFF_GRID_INLINE GridWeights<Acc> bilinear_weights(const GridCorners<Acc>& c) {
  GridWeights<Acc> weights{{(1 - c.y) * (1 - c.x), (1 - c.y) * c.x, c.y * (1 - c.x), c.y * c.x}};
  Acc total = 0;
  bool whole = true;
  for (int i = 0; i < 4; ++i) {
    weights.w[i] = c.there[i] ? weights.w[i] : Acc(0);
    total += weights.w[i];
    whole = whole && c.there[i];
  }
  // Divided only where a cell is missing, so that whole grids keep their exact weights.
  for (int i = 0; i < 4; ++i) {
    weights.w[i] = whole || total == 0 ? weights.w[i] : weights.w[i] / total;
  }
  return weights;
}

template <typename Acc>
SSLDIFF_GRID_INLINE GridWeights<Acc> nearest_weights(const GridCorners<Acc>& c) {
  const Acc shares[4] = {(1 - c.y) * (1 - c.x), (1 - c.y) * c.x, c.y * (1 - c.x), c.y * c.x};
  Acc largest = 0;
  for (int i = 0; i < 4; ++i) {
    largest = c.there[i] && shares[i] > largest ? shares[i] : largest;
  }
  GridWeights<Acc> weights{{0, 0, 0, 0}};
  bool found = largest == 0;
  for (int i = 0; i < 4; ++i) {
    weights.w[i] = !found && c.there[i] && shares[i] == largest ? Acc(1) : Acc(0);
    found = found || weights.w[i] > 0;
  }
  return weights;
}

// Products of the corners' vectors, row by row of the upper triangle: 00 01 02 03 11 12 13 22
// 23 33.
constexpr int kGridProducts = 10;

// S(u, v, s) = u u + v v: the two factors, from the vectors' products.
struct SlerpFactors {
  double u, v;
};

SSLDIFF_GRID_INLINE SlerpFactors slerp_factors(double uu, double uv, double vv, bool has_u,
                                               bool has_v, double share) {
  // Above this |cos| the sine in the denominator is too small, and a straight line as good.
  constexpr double kStraight = 0.9995;
  has_u = has_u && share < 1.0;
  has_v = has_v && share > 0.0;
  if (!has_u || !has_v) {
    return {has_u ? 1.0 : 0.0, has_v ? 1.0 : 0.0};
  }
  // Rounding may leave a square a little below zero.
  const double norms = std::sqrt(uu > 0.0 ? uu : 0.0) * std::sqrt(vv > 0.0 ? vv : 0.0);
  const double cosine = norms > 0.0 ? uv / norms : 1.0;
  if (cosine > kStraight || cosine < -kStraight) {
    return {1.0 - share, share};
  }
  const double angle = std::acos(cosine);
  const double sine = std::sin(angle);
  return {std::sin((1.0 - share) * angle) / sine, std::sin(share * angle) / sine};
}

// Slerp of slerps is a weighted sum too; products in double keep the second angle exact enough.
template <typename Acc>
SSLDIFF_GRID_INLINE GridWeights<Acc> slerp_weights(const GridCorners<Acc>& c,
                                                   const double* products) {
  const double* g = products;
  const double x = static_cast<double>(c.x);
  const SlerpFactors top = slerp_factors(g[0], g[1], g[4], c.there[0], c.there[1], x);
  const SlerpFactors low = slerp_factors(g[7], g[8], g[9], c.there[2], c.there[3], x);
  // A cell that takes no part may hold NaN, so its products are left out, not multiplied by 0.
  const auto product = [](double factor, double value) {
    return factor != 0.0 ? factor * value : 0.0;
  };
  const double uu = product(top.u * top.u, g[0]) + product(2.0 * top.u * top.v, g[1]) +
                    product(top.v * top.v, g[4]);
  const double vv = product(low.u * low.u, g[7]) + product(2.0 * low.u * low.v, g[8]) +
                    product(low.v * low.v, g[9]);
  const double uv = product(top.u * low.u, g[2]) + product(top.u * low.v, g[3]) +
                    product(top.v * low.u, g[5]) + product(top.v * low.v, g[6]);
  const bool has_top = top.u != 0.0 || top.v != 0.0;
  const bool has_low = low.u != 0.0 || low.v != 0.0;
  const SlerpFactors rows = slerp_factors(uu, uv, vv, has_top, has_low, static_cast<double>(c.y));
  return {{static_cast<Acc>(rows.u * top.u), static_cast<Acc>(rows.u * top.v),
           static_cast<Acc>(rows.v * low.u), static_cast<Acc>(rows.v * low.v)}};
}

}  // namespace ssldiff
