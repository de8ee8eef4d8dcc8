// SPDX-License-Identifier: Apache-2.0
// 3x3 convolutions by Winograd's F(4x4, 3x3) for the CPU; the equations stand in
// models/winograd.py. Maps are channels-last, so that transforms run along channels. A tile's
// outputs depend on nothing but its inputs: neither blocks nor threads nor the maps beside it
// change their bits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>

#include "../include/half.h"
#include "dispatch.h"
#include "panel_product.h"
#include "vectors.h"

namespace ssldiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tiles of a block: few, so that they stay near the core; but more where the filters are in no
// cache and each block reads all of them anew. A thread keeps the space of its largest block.
constexpr int64_t kTiles = 28, kMostTiles = 112;
constexpr int64_t kFilterBytes = 8 << 20, kBlockBytes = 16 << 20;

constexpr int kOut = 4;   // side of the outputs of a tile
constexpr int kSide = 6;  // and of its inputs; neighbours overlap by two
constexpr int64_t kPlaces = kSide * kSide;
// The points of the transforms are 0, +-a, +-b and infinity.
constexpr float kA = 0.75f, kB = 1.5f, kAA = kA * kA, kBB = kB * kB;

// B' d of six positions.
template <int kBytes>
SSLDIFF_INLINE void transform_six(const Vector<float, kBytes>* d, Vector<float, kBytes>* to) {
  const auto even_a = d[4] - kBB * d[2], odd_a = kA * d[3] - kA * kBB * d[1];
  const auto even_b = d[4] - kAA * d[2], odd_b = kB * d[3] - kB * kAA * d[1];
  to[0] = kAA * kBB * d[0] - (kAA + kBB) * d[2] + d[4];
  to[1] = even_a + odd_a;
  to[2] = even_a - odd_a;
  to[3] = even_b + odd_b;
  to[4] = even_b - odd_b;
  to[5] = kAA * kBB * d[1] - (kAA + kBB) * d[3] + d[5];
}

// A' m of six products.
template <int kBytes>
SSLDIFF_INLINE void four_outputs(const Vector<float, kBytes>* m, Vector<float, kBytes>* to) {
  const auto even_a = m[1] + m[2], odd_a = m[1] - m[2];
  const auto even_b = m[3] + m[4], odd_b = m[3] - m[4];
  to[0] = m[0] + even_a + even_b;
  to[1] = kA * odd_a + kB * odd_b;
  to[2] = kAA * even_a + kBB * even_b;
  to[3] = kA * kAA * odd_a + kB * kBB * odd_b + m[5];
}

// Tiles are numbered through all maps: row by row, map by map.
struct Geometry {
  int64_t maps, channels, out_channels, height, width;  // of the result
  int64_t zoom;  // 2 where each position of the maps stands for 2x2 of the convolution's input

  int64_t tiles_y() const { return (height + kOut - 1) / kOut; }
  int64_t tiles_x() const { return (width + kOut - 1) / kOut; }
  int64_t tiles() const { return maps * tiles_y() * tiles_x(); }
  int64_t padded() const { return panels_of(out_channels) * kPanel; }
};

// A vector of floats from `count` values, then zeros.
template <int kBytes, typename T>
SSLDIFF_INLINE Vector<float, kBytes> load_some(const T* from, int64_t count) {
  constexpr int64_t kLanes = kBytes / 4;
  if (count >= kLanes) {
    return widen_lanes<kBytes, float>(from);
  }
  T some[kLanes] = {};
  std::memcpy(some, from, count * sizeof(T));
  return widen_lanes<kBytes, float>(some);
}

template <int kBytes, typename T>
SSLDIFF_INLINE void store_some(Vector<float, kBytes> value, T* to, int64_t count) {
  const int64_t bytes = std::min<int64_t>(count, kBytes / 4) * sizeof(T);
  if constexpr (std::is_same_v<T, BFloat16>) {
    using Halves = Vector<uint16_t, kBytes / 2>;
    const auto whole = (Vector<uint32_t, kBytes>)bfloat16_lanes<kBytes>(value);
    const Halves halves = __builtin_convertvector(whole >> 16, Halves);
    if (count >= kBytes / 4) {
      std::memcpy(to, &halves, sizeof(halves));
    } else {
      std::memcpy(to, &halves, bytes);
    }
  } else if (count >= kBytes / 4) {
    std::memcpy(to, &value, kBytes);
  } else {
    std::memcpy(to, &value, bytes);
  }
}

// Far from a multiple of the caches' 4096 bytes, so that the places of a tile are in no one's way.
int64_t plane(int64_t tiles, int64_t channels) {
  return (tiles * channels + 1023) / 1024 * 1024 + 80;
}

template <typename T>
struct Convolution {
  const T* maps;         // [N, H / zoom, W / zoom, C]
  const float* filters;  // [kPlaces, panels, C, kPanel]
  const float* bias;     // [K], or null
  const T* add;          // [N, H, W, K], or null
  T* out;                // [N, H, W, K]
  Geometry shape;
  int64_t blocks;

  int64_t most_tiles() const { return (shape.tiles() + blocks - 1) / blocks; }
  int64_t workspace() const {
    return 16 +
           kPlaces * (plane(most_tiles(), shape.channels) + plane(most_tiles(), shape.padded()));
  }

  template <typename Bytes>
  SSLDIFF_INLINE void operator()(int64_t begin, int64_t end, Bytes) const {
    static thread_local std::unique_ptr<float[]> space;
    static thread_local int64_t size = 0;
    if (size < workspace()) {
      space.reset(new float[workspace()]);
      size = workspace();
    }
    const auto address = reinterpret_cast<uintptr_t>(space.get());
    float* tiles = space.get() + (64 - address % 64) % 64 / sizeof(float);
    float* products = tiles + kPlaces * plane(most_tiles(), shape.channels);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * shape.tiles() / blocks;
      const int64_t last = (block + 1) * shape.tiles() / blocks;
      for (int64_t tile = first; tile < last; ++tile) {
        transform<Bytes::value>(tile, tiles + (tile - first) * shape.channels);
      }
      multiply<Bytes::value>(last - first, tiles, products);
      for (int64_t tile = first; tile < last; ++tile) {
        finish<Bytes::value>(tile, products + (tile - first) * shape.padded());
      }
    }
  }

  struct Place {
    int64_t map, y, x;
  };

  SSLDIFF_INLINE Place place(int64_t tile) const {
    const int64_t row = tile / shape.tiles_x();
    return {row / shape.tiles_y(), row % shape.tiles_y() * kOut, tile % shape.tiles_x() * kOut};
  }

  // B' d B of one tile, a vector of channels at a time. Outside the map there are zeros.
  template <int kBytes>
  SSLDIFF_INLINE void transform(int64_t tile, float* to) const {
    const Place at = place(tile);
    const int64_t height = shape.height / shape.zoom, width = shape.width / shape.zoom;
    const T* rows[kSide][kSide];
    for (int u = 0; u < kSide; ++u) {
      for (int v = 0; v < kSide; ++v) {
        const int64_t y = at.y + u - 1, x = at.x + v - 1;
        const bool inside = y >= 0 && y < shape.height && x >= 0 && x < shape.width;
        rows[u][v] = inside ? maps + ((at.map * height + y / shape.zoom) * width + x / shape.zoom) *
                                         shape.channels
                            : nullptr;
      }
    }
    const int64_t stride = plane(most_tiles(), shape.channels);
    for (int64_t c = 0; c < shape.channels; c += kBytes / 4) {
      const int64_t count = shape.channels - c;
      Vector<float, kBytes> half[kSide][kSide];
      for (int v = 0; v < kSide; ++v) {
        Vector<float, kBytes> column[kSide], made[kSide];
        for (int u = 0; u < kSide; ++u) {
          const T* from = rows[u][v];
          column[u] =
              from == nullptr ? Vector<float, kBytes>{} : load_some<kBytes>(from + c, count);
        }
        transform_six<kBytes>(column, made);
        for (int u = 0; u < kSide; ++u) {
          half[u][v] = made[u];
        }
      }
      for (int u = 0; u < kSide; ++u) {
        Vector<float, kBytes> made[kSide];
        transform_six<kBytes>(half[u], made);
        for (int v = 0; v < kSide; ++v) {
          store_some<kBytes>(made[v], to + (u * kSide + v) * stride + c, count);
        }
      }
    }
  }

  template <int kBytes>
  SSLDIFF_INLINE void multiply(int64_t count, const float* tiles, float* products) const {
    const int64_t panels = panels_of(shape.out_channels);
    for (int64_t place = 0; place < kPlaces; ++place) {
      const float* from = tiles + place * plane(most_tiles(), shape.channels);
      float* to = products + place * plane(most_tiles(), shape.padded());
      for (int64_t panel = 0; panel < panels; ++panel) {
        panel_product<kBytes>(count, from, shape.channels, shape.channels,
                              filters + (place * panels + panel) * shape.channels * kPanel,
                              to + panel * kPanel, shape.padded());
      }
    }
  }

  // A' m A of one tile, with what follows it.
  template <int kBytes>
  SSLDIFF_INLINE void finish(int64_t tile, const float* from) const {
    const Place at = place(tile);
    const int64_t stride = plane(most_tiles(), shape.padded());
    for (int64_t k = 0; k < shape.out_channels; k += kBytes / 4) {
      const int64_t count = shape.out_channels - k;
      Vector<float, kBytes> half[kOut][kSide];
      for (int v = 0; v < kSide; ++v) {
        Vector<float, kBytes> column[kSide], made[kOut];
        for (int u = 0; u < kSide; ++u) {
          column[u] = load_lanes<float, kBytes>(from + (u * kSide + v) * stride + k);
        }
        four_outputs<kBytes>(column, made);
        for (int u = 0; u < kOut; ++u) {
          half[u][v] = made[u];
        }
      }
      const auto shift =
          bias == nullptr ? Vector<float, kBytes>{} : load_some<kBytes>(bias + k, count);
      for (int u = 0; u < kOut && at.y + u < shape.height; ++u) {
        Vector<float, kBytes> made[kOut];
        four_outputs<kBytes>(half[u], made);
        for (int v = 0; v < kOut && at.x + v < shape.width; ++v) {
          const int64_t position =
              ((at.map * shape.height + at.y + u) * shape.width + at.x + v) * shape.out_channels +
              k;
          auto value = made[v] + shift;
          if (add != nullptr) {
            value += load_some<kBytes>(add + position, count);
          }
          store_some<kBytes>(value, out + position, count);
        }
      }
    }
  }
};

bool is_plain(const Tensor& tensor, int64_t dimensions, ScalarType type = ScalarType::Float) {
  return tensor.scalar_type() == type && tensor.dim() == dimensions && tensor.is_cpu() &&
         tensor.is_contiguous();
}

template <typename T>
const T* values_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

int64_t blocks_of(const Geometry& shape) {
  const int64_t filters = 4 * kPlaces * shape.channels * shape.padded();
  const int64_t tile = 4 * kPlaces * (shape.channels + shape.padded());
  const int64_t most =
      filters > kFilterBytes ? std::min(kMostTiles, std::max(kTiles, kBlockBytes / tile)) : kTiles;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = (shape.tiles() + most - 1) / most;
  return std::min((blocks + threads - 1) / threads * threads, shape.tiles());
}

template <typename T>
void convolve(const Tensor& maps, const Tensor& filters, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& add, const Tensor& out, const Geometry& shape) {
  const Convolution<T> body{static_cast<const T*>(maps.const_data_ptr()),
                            static_cast<const float*>(filters.const_data_ptr()),
                            values_of<float>(bias),
                            values_of<T>(add),
                            static_cast<T*>(out.mutable_data_ptr()),
                            shape,
                            blocks_of(shape)};
  parallel_dispatch(body.blocks, 1, body);
}

Tensor winograd(Tensor maps, Tensor filters, int64_t out_channels, int64_t zoom,
                std::optional<Tensor> bias, std::optional<Tensor> add) {
  const ScalarType type = maps.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::BFloat16) &&
                      is_plain(maps, 4, type) && (zoom == 1 || zoom == 2),
                  "winograd: maps must be contiguous [N, H, W, C] float32 or bfloat16, and zoom 1 "
                  "or 2.");
  STD_TORCH_CHECK(is_plain(filters, 4) && filters.size(0) == kPlaces && out_channels > 0 &&
                      filters.size(1) == panels_of(out_channels) &&
                      filters.size(2) == maps.size(3) && filters.size(3) == kPanel,
                  "winograd: filters must be contiguous [36, panels, C, 32] float32, with panels "
                  "for all output channels.");
  STD_TORCH_CHECK(!bias.has_value() || (is_plain(*bias, 1) && bias->size(0) == out_channels),
                  "winograd: bias must be contiguous [K] float32.");
  const Geometry shape{maps.size(0),        maps.size(3),        out_channels,
                       zoom * maps.size(1), zoom * maps.size(2), zoom};
  Tensor out =
      torch::stable::new_empty(maps, {shape.maps, shape.height, shape.width, out_channels});
  if (add.has_value()) {
    bool fits = is_plain(*add, 4, type);
    for (int64_t d = 0; fits && d < 4; ++d) {
      fits = add->size(d) == out.size(d);
    }
    STD_TORCH_CHECK(fits, "winograd: add must be contiguous [N, H, W, K] in the dtype of maps.");
  }
  if (out.numel() > 0) {
    const auto made = type == ScalarType::Float ? convolve<float> : convolve<BFloat16>;
    made(maps, filters, bias, add, out, shape);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ssldiff, CPU, m) { m.impl("winograd", TORCH_BOX(&winograd)); }

}  // namespace
}  // namespace ssldiff
