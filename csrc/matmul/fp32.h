// A matmul with fp32 sums of fp32 rows and weights of any dtype. Sampling uses it for fp16 and fp32, and for bf16 where
// the CPU has no bf16 products. base.cpp, avx2.cpp and avx512.cpp include the vectors of their instruction set, then
// this file.
//
//     out[r][j] = sum_k x[r][k] * weight[j][k]
//               = sum over blocks of kDepth columns k, in order, of (the fp32 sum over the block, in order)
//
// Every element of the result is summed in this order. A draw must depend on its own row alone, and a library's product
// may sum a row in another order when other rows or threads join it. multiply_tile keeps the order, and multiply_edge
// calls it for the tiles at an edge.
//
// x is packed in tiles of kRows rows. A thread packs a panel of kPanel rows of the weight and kDepth columns at a time,
// then multiplies every tile with it. The register block is kRows x kVecs vectors of sums, which fill 24 of the 32
// registers of AVX-512, or 12 of 16 elsewhere.
#pragma once

#include <algorithm>

#include "matmul/problem.h"
#include "simd/math.h"

namespace lumos {
namespace {

constexpr int64_t kRows = kFp32TileRows;
constexpr int64_t kVecs = kLanes == 16 ? 4 : 2;
constexpr int64_t kPanel = kVecs * kLanes;
constexpr int64_t kDepth = 64;  // a panel of 16 KB stays in L1 beside a tile

/// Packs tile `tile` into its place in every depth block of packed [depth block][tile][kDepth][kRows]. The padding
/// beyond the last row is zero.
void pack_tile(const float* x, int64_t rows, int64_t columns, int64_t stride, int64_t tile, float* packed) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t begin = 0; begin < columns; begin += kDepth) {
    const int64_t depth = std::min(kDepth, columns - begin);
    float* to = packed + begin * tiles * kRows + tile * depth * kRows;
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t row = tile * kRows + r;
      for (int64_t k = 0; k < depth; ++k) to[k * kRows + r] = row < rows ? x[row * stride + begin + k] : 0.0f;
    }
  }
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) { return to_float(x); }

/// Packs columns begin .. begin + depth - 1 of rows row .. row + kPanel - 1 of the weight to a panel [kDepth][kPanel].
/// A row of the weight becomes a column of the panel and of the result. The padding is zero.
template <class T>
void pack_panel(const Fp32Weight& weight, int64_t row, int64_t begin, int64_t depth, float* to) {
  alignas(64) float wide[kPanel * kDepth];
  for (int64_t j = 0; j < kPanel; ++j) {
    float* line = wide + j * kDepth;
    int64_t k = 0;
    if (row + j < weight.rows) {
      const T* from = static_cast<const T*>(weight.data) + (row + j) * weight.stride + begin;
      for (; k + kLanes <= depth; k += kLanes) store(line + k, load(from + k));
      for (; k < depth; ++k) line[k] = widen(from[k]);
    }
    for (; k < kDepth; ++k) line[k] = 0.0f;
  }
  transpose(wide, kDepth, kPanel, kDepth, to, kPanel);
}

void pack_panel(const Fp32Weight& weight, int64_t row, int64_t begin, int64_t depth, float* to) {
  switch (weight.dtype) {
    case Dtype::bf16:
      return pack_panel<BFloat16>(weight, row, begin, depth, to);
    case Dtype::fp16:
      return pack_panel<Half>(weight, row, begin, depth, to);
    case Dtype::fp32:
      return pack_panel<float>(weight, row, begin, depth, to);
  }
}

/// Multiplies left [depth][kRows] with right [depth][kPanel]. Writes the product to a whole tile [kRows][kPanel] of the
/// result, or adds it if `add`.
inline void multiply_tile(const float* left, const float* right, int64_t depth, bool add, float* to, int64_t stride) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVecs; ++v) sums[r][v] = broadcast(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k, left += kRows, right += kPanel) {
    Vec columns[kVecs];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVecs; ++v) columns[v] = load(right + v * kLanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const Vec x = broadcast(left[r]);
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVecs; ++v) sums[r][v] = fma(x, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVecs; ++v) {
      float* at = to + r * stride + v * kLanes;
      store(at, add ? load(at) + sums[r][v] : sums[r][v]);
    }
  }
}

/// Does the work of multiply_tile for a tile at an edge, of which only `rows` rows and `columns` columns exist.
void multiply_edge(const float* left, const float* right, int64_t depth, bool add, float* to, int64_t stride,
                   int64_t rows, int64_t columns) {
  alignas(64) float tile[kRows * kPanel];
  multiply_tile(left, right, depth, false, tile, kPanel);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns; ++j) {
      float& at = to[r * stride + j];
      at = add ? at + tile[r * kPanel + j] : tile[r * kPanel + j];
    }
  }
}

void multiply(const float* packed, int64_t rows, const Fp32Weight& weight, float* out, int64_t first, int64_t last) {
  alignas(64) float panel[kDepth * kPanel];
  const int64_t tiles = (rows + kRows - 1) / kRows, stride = weight.rows;
  for (int64_t column = first * kPanel; column < std::min(last * kPanel, weight.rows); column += kPanel) {
    int64_t begin = 0;
    do {  // a weight without columns takes one iteration, which writes zeros
      const int64_t depth = std::min(kDepth, weight.columns - begin), columns = std::min(kPanel, weight.rows - column);
      pack_panel(weight, column, begin, depth, panel);
      const float* left = packed + begin * tiles * kRows;
      for (int64_t tile = 0; tile < tiles; ++tile, left += depth * kRows) {
        float* to = out + tile * kRows * stride + column;
        const int64_t tile_rows = std::min(kRows, rows - tile * kRows);
        if (tile_rows == kRows && columns == kPanel) {
          multiply_tile(left, panel, depth, begin > 0, to, stride);
        } else {
          multiply_edge(left, panel, depth, begin > 0, to, stride, tile_rows, columns);
        }
      }
      begin += kDepth;
    } while (begin < weight.columns);
  }
}

}  // namespace
}  // namespace lumos
