// SPDX-License-Identifier: Apache-2.0
// The two transforms of a 3x3 convolution by Winograd's F(2x2, 3x3) for the CPU; the equations
// stand in ops/winograd.py. Maps are channels-last, so that every sum runs over channels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "dispatch.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSide = 4;     // of a tile; neighbours overlap by two
constexpr int64_t kPlaces = 16;  // in a tile
constexpr int64_t kGrain = 1;    // rows of tiles of a task at least
constexpr int64_t kBlock = 64;   // channels that are transformed at a time, kept in registers

// Rows of tiles of all maps are numbered through: row r is row r % tiles_y of map r / tiles_y.
struct Geometry {
  int64_t maps, channels, height, width;

  int64_t tiles_y() const { return (height + 1) / 2; }
  int64_t tiles_x() const { return (width + 1) / 2; }
  int64_t rows() const { return maps * tiles_y(); }
  int64_t tiles() const { return rows() * tiles_x(); }
};

struct ToTiles {
  const float* maps;  // [N, H, W, C]
  float* tiles;       // [16, T, C]
  Geometry shape;

  template <typename Bytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, Bytes) const {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / shape.tiles_y(), y = 2 * (row % shape.tiles_y()) - 1;
      for (int64_t tile = 0; tile < shape.tiles_x(); ++tile) {
        for (int64_t first = 0; first < shape.channels; first += kBlock) {
          const int64_t count = std::min(kBlock, shape.channels - first);
          one(n, y, 2 * tile - 1, first, count, row * shape.tiles_x() + tile);
        }
      }
    }
  }

  SSLDIFF_INLINE void one(int64_t n, int64_t y, int64_t x, int64_t first, int64_t count,
                          int64_t tile) const {
    float half[kSide][kSide][kBlock];  // B' d: rows transformed
    for (int64_t v = 0; v < kSide; ++v) {
      float in[kSide][kBlock];
      for (int64_t u = 0; u < kSide; ++u) {
        load(n, y + u, x + v, first, count, in[u]);
      }
      for (int64_t c = 0; c < count; ++c) {
        half[0][v][c] = in[0][c] - in[2][c];
        half[1][v][c] = in[1][c] + in[2][c];
        half[2][v][c] = in[2][c] - in[1][c];
        half[3][v][c] = in[1][c] - in[3][c];
      }
    }
    const int64_t plane = shape.tiles() * shape.channels;
    float* to = tiles + tile * shape.channels + first;
    for (int64_t u = 0; u < kSide; ++u) {
      for (int64_t c = 0; c < count; ++c) {
        to[(4 * u + 0) * plane + c] = half[u][0][c] - half[u][2][c];
      }
      for (int64_t c = 0; c < count; ++c) {
        to[(4 * u + 1) * plane + c] = half[u][1][c] + half[u][2][c];
      }
      for (int64_t c = 0; c < count; ++c) {
        to[(4 * u + 2) * plane + c] = half[u][2][c] - half[u][1][c];
      }
      for (int64_t c = 0; c < count; ++c) {
        to[(4 * u + 3) * plane + c] = half[u][1][c] - half[u][3][c];
      }
    }
  }

  // Outside the map there are zeros.
  SSLDIFF_INLINE void load(int64_t n, int64_t y, int64_t x, int64_t first, int64_t count,
                           float* __restrict to) const {
    if (y < 0 || y >= shape.height || x < 0 || x >= shape.width) {
      for (int64_t c = 0; c < count; ++c) {
        to[c] = 0.0f;
      }
      return;
    }
    const float* __restrict from =
        maps + ((n * shape.height + y) * shape.width + x) * shape.channels + first;
    for (int64_t c = 0; c < count; ++c) {
      to[c] = from[c];
    }
  }
};

struct FromTiles {
  const float* const* products;  // 16 of [T, C]
  const float* bias;             // [C], or null
  const float* add;              // [N, H, W, C], or null
  float* maps;                   // [N, H, W, C]
  Geometry shape;

  template <typename Bytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, Bytes) const {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / shape.tiles_y(), y = 2 * (row % shape.tiles_y());
      for (int64_t tile = 0; tile < shape.tiles_x(); ++tile) {
        for (int64_t first = 0; first < shape.channels; first += kBlock) {
          const int64_t count = std::min(kBlock, shape.channels - first);
          one(n, y, 2 * tile, first, count, row * shape.tiles_x() + tile);
        }
      }
    }
  }

  SSLDIFF_INLINE void one(int64_t n, int64_t y, int64_t x, int64_t first, int64_t count,
                          int64_t tile) const {
    float half[2][kSide][kBlock];  // A' m: rows transformed
    const int64_t offset = tile * shape.channels + first;
    for (int64_t v = 0; v < kSide; ++v) {
      const float* __restrict m0 = products[v] + offset;
      const float* __restrict m1 = products[4 + v] + offset;
      const float* __restrict m2 = products[8 + v] + offset;
      const float* __restrict m3 = products[12 + v] + offset;
      for (int64_t c = 0; c < count; ++c) {
        half[0][v][c] = m0[c] + m1[c] + m2[c];
        half[1][v][c] = m1[c] - m2[c] - m3[c];
      }
    }
    for (int64_t u = 0; u < 2 && y + u < shape.height; ++u) {
      float out[2][kBlock];
      for (int64_t c = 0; c < count; ++c) {
        out[0][c] = half[u][0][c] + half[u][1][c] + half[u][2][c];
        out[1][c] = half[u][1][c] - half[u][2][c] - half[u][3][c];
      }
      for (int64_t v = 0; v < 2 && x + v < shape.width; ++v) {
        const int64_t at =
            ((n * shape.height + y + u) * shape.width + x + v) * shape.channels + first;
        store(out[v], at, first, count);
      }
    }
  }

  SSLDIFF_INLINE void store(const float* __restrict from, int64_t at, int64_t first,
                            int64_t count) const {
    float* __restrict to = maps + at;
    if (bias != nullptr && add != nullptr) {
      for (int64_t c = 0; c < count; ++c) {
        to[c] = from[c] + bias[first + c] + add[at + c];
      }
    } else if (bias != nullptr) {
      for (int64_t c = 0; c < count; ++c) {
        to[c] = from[c] + bias[first + c];
      }
    } else {
      for (int64_t c = 0; c < count; ++c) {
        to[c] = add != nullptr ? from[c] + add[at + c] : from[c];
      }
    }
  }
};

bool is_plain(const Tensor& tensor, int64_t dimensions) {
  return tensor.scalar_type() == ScalarType::Float && tensor.dim() == dimensions &&
         tensor.is_cpu() && tensor.is_contiguous();
}

Tensor winograd_tiles(Tensor maps) {
  STD_TORCH_CHECK(is_plain(maps, 4),
                  "winograd_tiles: maps must be contiguous [N, H, W, C] float32.");
  const Geometry shape{maps.size(0), maps.size(3), maps.size(1), maps.size(2)};
  Tensor tiles = torch::stable::new_empty(maps, {kPlaces, shape.tiles(), shape.channels});
  if (tiles.numel() > 0) {
    const ToTiles body{static_cast<const float*>(maps.const_data_ptr()),
                       static_cast<float*>(tiles.mutable_data_ptr()), shape};
    parallel_dispatch(shape.rows(), kGrain, body);
  }
  return tiles;
}

Tensor winograd_maps(std::vector<Tensor> products, std::optional<Tensor> bias,
                     std::optional<Tensor> add, std::vector<int64_t> sizes) {
  STD_TORCH_CHECK(products.size() == kPlaces && sizes.size() == 3 && sizes[0] >= 0 &&
                      sizes[1] > 0 && sizes[2] > 0 && products[0].dim() == 2,
                  "winograd_maps: products must be 16 of [T, C], and sizes N, H and W.");
  const Geometry shape{sizes[0], products[0].size(1), sizes[1], sizes[2]};
  std::vector<const float*> pointers;
  for (const Tensor& product : products) {
    STD_TORCH_CHECK(is_plain(product, 2) && product.size(0) == shape.tiles() &&
                        product.size(1) == shape.channels,
                    "winograd_maps: products must all be contiguous [T, C] float32, with a row for "
                    "each tile of the maps.");
    pointers.push_back(static_cast<const float*>(product.const_data_ptr()));
  }
  Tensor maps = torch::stable::new_empty(products[0],
                                         {shape.maps, shape.height, shape.width, shape.channels});
  const float *bias_values = nullptr, *add_values = nullptr;
  if (bias.has_value()) {
    STD_TORCH_CHECK(is_plain(*bias, 1) && bias->size(0) == shape.channels,
                    "winograd_maps: bias must be contiguous [C] float32.");
    bias_values = static_cast<const float*>(bias->const_data_ptr());
  }
  if (add.has_value()) {
    STD_TORCH_CHECK(is_plain(*add, 4) && add->numel() == maps.numel() &&
                        add->size(3) == shape.channels && add->size(2) == shape.width,
                    "winograd_maps: add must be contiguous [N, H, W, C] float32.");
    add_values = static_cast<const float*>(add->const_data_ptr());
  }
  if (maps.numel() > 0) {
    const FromTiles body{pointers.data(), bias_values, add_values,
                         static_cast<float*>(maps.mutable_data_ptr()), shape};
    parallel_dispatch(shape.rows(), kGrain, body);
  }
  return maps;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) {
  m.impl("winograd_tiles", TORCH_BOX(&winograd_tiles));
  m.impl("winograd_maps", TORCH_BOX(&winograd_maps));
}

}  // namespace
}  // namespace ssldiff
