// bf16 matmuls with fp32 sums and fp32 results. torch's CPU matmul does not offer them: it would round logits to bf16.
//
//     multiply:   out[r][j]  = sum_k x[r][k] * weight[j][k]
//     add_outer:  out[n][c] += sum_r left[r][n] * right[r][c]
//     VDPBF16PS:  acc[i] += a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
//
// The instruction multiplies pairs. Both factors are therefore packed as pairs along the summed dimension, a uint32 for
// each pair. The left factor is packed in tiles of kRows rows, whose pairs are broadcast. The right factor is packed in
// panels of kColumns columns, whose pairs are loaded as vectors.
//
// The register block is kRows x kColumns sums: kRows * 2 accumulators and two vectors of the right factor take 26 of
// the 32 registers. multiply goes through the sum in blocks of kDepth pairs and multiplies every tile with a panel of
// that depth. add_outer multiplies a group of kGroup tiles with each panel, over all pairs.
#include <immintrin.h>

#include <algorithm>

#include "matmul/problem.h"

namespace lumos {
namespace {

constexpr int64_t kRows = kBf16TileRows, kColumns = kBf16Panel;
constexpr int64_t kDepth = 128;  // pairs summed at once: a panel of 16 KB stays in L1 beside a tile

/// A tile of the result. At an edge, fewer than kRows rows and kColumns columns exist.
struct Tile {
  float* to;
  int64_t stride, rows, columns;  // columns may exceed kColumns
  bool add;                       // add the product to the tile instead of overwriting it
};

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

[[gnu::target("avx512bf16"), gnu::noinline]] void multiply_tile(const uint32_t* left, const uint32_t* right,
                                                                int64_t pairs, const Tile& tile) {
  __m512 sums[kRows][2];
#pragma GCC unroll 16
  for (int64_t r = 0; r < kRows; ++r) {
    sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    if (r < tile.rows) {
      _mm_prefetch(reinterpret_cast<const char*>(tile.to + r * tile.stride), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(tile.to + r * tile.stride + 16), _MM_HINT_T0);
    }
  }
  for (int64_t p = 0; p < pairs; ++p, left += kRows, right += kColumns) {
    const __m512bh low = reinterpret_cast<__m512bh>(_mm512_loadu_si512(right));
    const __m512bh high = reinterpret_cast<__m512bh>(_mm512_loadu_si512(right + 16));
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) {
      const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(left[r])));
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, low);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, high);
    }
  }
  const __mmask16 mask[2] = {first_lanes(tile.columns), first_lanes(tile.columns - 16)};
#pragma GCC unroll 16
  for (int64_t r = 0; r < kRows; ++r) {
    if (r >= tile.rows) continue;
    for (int64_t half = 0; half < 2; ++half) {
      float* to = tile.to + r * tile.stride + 16 * half;
      if (tile.add) sums[r][half] = _mm512_add_ps(_mm512_maskz_loadu_ps(mask[half], to), sums[r][half]);
      _mm512_mask_storeu_ps(to, mask[half], sums[r][half]);
    }
  }
}

/// Transposes 16 x 16 uint32.
inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  }
  // Now lane group g of x[4 i + j] holds column 4 g + j of rows 4 i .. 4 i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even01 = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    y[j] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    y[8 + j] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    y[4 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    y[12 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

/// Loads pairs begin .. begin + 15 of 16 rows and transposes them. The padding beyond the last column and row is zero.
inline void load_pairs(const Bf16Matrix& from, int64_t row, int64_t begin, __m512i (&to)[16]) {
  const int64_t left = std::min<int64_t>(32, from.columns - 2 * begin);
  const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
  for (int64_t i = 0; i < 16; ++i) {
    const BFloat16* at = from.data + (row + i) * from.stride + 2 * begin;
    to[i] = row + i < from.rows ? _mm512_maskz_loadu_epi16(mask, at) : _mm512_setzero_si512();
  }
  transpose(to);
}

/// Packs pairs begin .. begin + pairs - 1 of kColumns rows of the matrix into a panel [pair][kColumns]. A row of the
/// matrix becomes a column of the panel and of the result.
void pack_panel(const Bf16Matrix& from, int64_t row, int64_t begin, int64_t pairs, uint32_t* to) {
  __m512i block[16];
  for (int64_t half = 0; half < kColumns; half += 16) {
    for (int64_t p = 0; p < pairs; p += 16) {
      load_pairs(from, row + half, begin + p, block);
      for (int64_t i = 0; i < std::min<int64_t>(16, pairs - p); ++i) {
        _mm512_storeu_si512(to + (p + i) * kColumns + half, block[i]);
      }
    }
  }
}

/// Packs tile `tile` into its place in every depth block of packed [depth block][tile][pair][kRows].
void pack_tile(const Bf16Matrix& from, int64_t tile, uint32_t* packed) {
  const int64_t pairs = (from.columns + 1) / 2, tiles = (from.rows + kRows - 1) / kRows;
  __m512i block[16];
  for (int64_t begin = 0; begin < pairs; begin += kDepth) {
    const int64_t depth = std::min(kDepth, pairs - begin);
    uint32_t* to = packed + begin * tiles * kRows + tile * depth * kRows;
    for (int64_t p = 0; p < depth; p += 16) {
      load_pairs(from, tile * kRows, begin + p, block);
      for (int64_t i = 0; i < std::min<int64_t>(16, depth - p); ++i) {
        _mm512_mask_storeu_epi32(to + (p + i) * kRows, first_lanes(kRows), block[i]);
      }
    }
  }
}

/// Returns 16 columns of rows 2 * pair and 2 * pair + 1. Each uint32 is the pair of one column. The padding beyond the
/// matrix is zero.
inline __m512i row_pair(const Bf16Matrix& from, int64_t pair, int64_t column) {
  const __mmask16 mask = first_lanes(from.columns - column);
  const BFloat16* at = from.data + 2 * pair * from.stride + column;
  const __m256i even = _mm256_maskz_loadu_epi16(mask, at);
  const __m256i odd = 2 * pair + 1 < from.rows ? _mm256_maskz_loadu_epi16(mask, at + from.stride) : __m256i{};
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

/// Packs kColumns columns of the matrix, paired along the rows, into panel `panel` of packed [panel][pair][kColumns].
void pack_columns(const Bf16Matrix& from, int64_t panel, uint32_t* packed) {
  const int64_t pairs = (from.rows + 1) / 2;
  uint32_t* to = packed + panel * pairs * kColumns;
  for (int64_t p = 0; p < pairs; ++p) {
    for (int64_t half = 0; half < kColumns; half += 16) {
      _mm512_storeu_si512(to + p * kColumns + half, row_pair(from, p, panel * kColumns + half));
    }
  }
}

void multiply(const uint32_t* packed, int64_t rows, const Bf16Matrix& weight, float* out, int64_t first,
              int64_t last) {
  alignas(64) uint32_t panel[kDepth * kColumns];
  const int64_t pairs = (weight.columns + 1) / 2, tiles = (rows + kRows - 1) / kRows;
  for (int64_t column = first * kColumns; column < std::min(last * kColumns, weight.rows); column += kColumns) {
    for (int64_t begin = 0; begin < pairs; begin += kDepth) {
      const int64_t depth = std::min(kDepth, pairs - begin);
      pack_panel(weight, column, begin, depth, panel);
      const uint32_t* left = packed + begin * tiles * kRows;
      for (int64_t tile = 0; tile < tiles; ++tile, left += depth * kRows) {
        multiply_tile(left, panel, depth,
                      {out + tile * kRows * weight.rows + column, weight.rows, std::min(kRows, rows - tile * kRows),
                       weight.rows - column, begin > 0});
      }
    }
  }
}

/// The number of tiles of the left factor that share a panel while it is in L1.
constexpr int64_t kGroup = kBf16Group / kRows;

void add_outer(const Bf16Matrix& left, const uint32_t* packed, int64_t width, float* out, int64_t group,
               uint32_t* scratch) {
  const int64_t pairs = (left.rows + 1) / 2, first = group * kBf16Group;
  for (int64_t tile = 0; tile < kGroup; ++tile) {
    uint32_t* to = scratch + tile * pairs * kRows;
    for (int64_t p = 0; p < pairs; ++p) {
      const __m512i values = row_pair(left, p, std::min(first + tile * kRows, left.columns));
      _mm512_mask_storeu_epi32(to + p * kRows, first_lanes(kRows), values);
    }
  }
  for (int64_t column = 0; column < width; column += kColumns) {
    const uint32_t* panel = packed + column * pairs;
    for (int64_t tile = 0; tile < kGroup && first + tile * kRows < left.columns; ++tile) {
      const int64_t row = first + tile * kRows;
      multiply_tile(scratch + tile * pairs * kRows, panel, pairs,
                    {out + row * width + column, width, std::min(kRows, left.columns - row), width - column, true});
    }
  }
}

}  // namespace

const Bf16Matmul kBf16MatmulAvx512 = {pack_tile, pack_columns, multiply, add_outer};

}  // namespace lumos
