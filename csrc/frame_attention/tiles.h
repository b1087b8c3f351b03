// The matmul of frame attention in AMX tile registers:
//     C[m, n] = A[m, k] B[k, n], with the updates of matmul.h
// The template parameter Tiles is a small set of tile operations: AmxTiles runs the CPU's instructions, ModelTiles in
// tile_model.h computes them in plain C++.
//
// A tile register is 16 rows of 64 bytes. It holds 16 x 16 fp32 of C, 16 rows x 32 bf16 of A, or 16 pairs x 16 columns
// of B. C is cut into blocks of 32 x 32. The eight registers hold such a block (0 to 3), two tiles of A (4, 5) and two
// of B (6, 7), so 32 bf16 of the summed dimension take four products for four loads.
#pragma once

#include <cstdint>

#include "frame_attention/matmul.h"

namespace lumos {
namespace {

/// The operand of ldtilecfg.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

/// Gives all eight tile registers their full size.
constexpr TileConfig kFullTiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/// The instructions as assembly. GCC learnt them with version 11, and its intrinsics for tile loads and stores do not
/// say that they touch memory, so ordinary stores would move across them. Here each that touches memory is a fence.
struct AmxTiles {
  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
  static void release() { asm volatile("tilerelease" : : : "memory"); }
  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  /// sum += a b
  template <int kSum, int kA, int kB>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
  }
};

/// A step is a word of two bf16, and a tile is 16 steps deep.
template <class Tiles, Update kUpdate>
[[gnu::noinline]] void matmul_tiles(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                                    int64_t columns, int64_t steps, float* c, int64_t c_stride) {
  constexpr int64_t kBytes = sizeof(float);
  const int64_t a_bytes = a_stride * kBytes, b_bytes = b_stride * kBytes, c_bytes = c_stride * kBytes;
  for (int64_t j = 0; j < columns; j += 32) {
    for (int64_t i = 0; i < rows; i += 32) {
      float *top = c + i * c_stride + j, *bottom = top + 16 * c_stride;
      if constexpr (kUpdate == Update::assign) {
        Tiles::template zero<0>();
        Tiles::template zero<1>();
        Tiles::template zero<2>();
        Tiles::template zero<3>();
      } else {
        Tiles::template load<0>(top, c_bytes);
        Tiles::template load<1>(top + 16, c_bytes);
        Tiles::template load<2>(bottom, c_bytes);
        Tiles::template load<3>(bottom + 16, c_bytes);
      }
      const float *left = a + i * a_stride, *right = b + j;
      for (int64_t k = 0; k < steps; k += 16, left += 16, right += 16 * b_stride) {
        Tiles::template load<4>(left, a_bytes);
        Tiles::template load<6>(right, b_bytes);
        Tiles::template dot<0, 4, 6>();
        Tiles::template load<7>(right + 16, b_bytes);
        Tiles::template dot<1, 4, 7>();
        Tiles::template load<5>(left + 16 * a_stride, a_bytes);
        Tiles::template dot<2, 5, 6>();
        Tiles::template dot<3, 5, 7>();
      }
      Tiles::template store<0>(top, c_bytes);
      Tiles::template store<1>(top + 16, c_bytes);
      Tiles::template store<2>(bottom, c_bytes);
      Tiles::template store<3>(bottom + 16, c_bytes);
    }
  }
}

/// The parameter M of the kernels (see VectorMath) for bf16 words and tile registers. In a trial on a CPU with AMX, key
/// blocks of 256 were faster than 64 and 128, key tiles of 256 were faster than 128, and 512 gained nothing.
template <class Tiles>
struct TileMath : Bf16Words {
  static constexpr int64_t kRows = 32, kQueryTile = 128, kKeyTile = 256, kKeyStep = 32;
  static constexpr bool kFixedReference = true;  // saves 18 to 29 % of forward's time, since the dots are this cheap

  static int64_t forward_tile(int64_t group) {
    const int64_t tokens = 256 / group / kRows * kRows;
    return tokens < kRows ? kRows : tokens;
  }
  static int64_t key_block(int64_t) { return 256; }

  static void begin() { Tiles::configure(kFullTiles); }
  static void end() { Tiles::release(); }

  /// Does as VectorMath::matmul. rows and columns are multiples of 32, steps a multiple of 16.
  template <Update kUpdate>
  static void matmul(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t columns,
                     int64_t steps, float* c, int64_t c_stride, const float* factors = nullptr) {
    if constexpr (kUpdate == Update::scale_and_add) {
      for (int64_t i = 0; i < rows; ++i) {
        const Vec factor = broadcast(factors[i]);
        for (int64_t j = 0; j < columns; j += kLanes) store(c + i * c_stride + j, load(c + i * c_stride + j) * factor);
      }
    }
    matmul_tiles<Tiles, kUpdate>(a, a_stride, b, b_stride, rows, columns, steps, c, c_stride);
  }
};

}  // namespace
}  // namespace lumos
