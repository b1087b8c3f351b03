// A model of AmxTiles (tiles.h) in plain C++. It follows the pseudocode of Intel's instruction set reference bit for
// bit. Tests use it on CPUs without AMX, and AMX is checked against it before its first use.
#pragma once

#include <xmmintrin.h>

#include <cstring>

#include "frame_attention/tiles.h"

namespace lumos {
namespace {

struct ModelTiles {
  struct State {
    TileConfig config;
    alignas(64) uint8_t tiles[8][16][64];
  };
  inline static thread_local State state = {};

  /// Traps unless `fine`. The CPU does so too if a tile is not configured or not as large as an instruction wants.
  static void require(bool fine) {
    if (!fine) __builtin_trap();
  }
  static int rows(int tile) { return state.config.rows[tile]; }
  static int row_bytes(int tile) { return state.config.row_bytes[tile]; }

  static void configure(const TileConfig& config) {
    require(config.palette == 1 && config.start_row == 0);
    std::memset(&state, 0, sizeof(state));
    state.config = config;
  }
  static void release() { std::memset(&state, 0, sizeof(state)); }

  template <int kTile>
  static void zero() {
    require(state.config.palette == 1);
    std::memset(state.tiles[kTile], 0, sizeof(state.tiles[kTile]));
  }
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    zero<kTile>();
    for (int i = 0; i < rows(kTile); ++i) {
      std::memcpy(state.tiles[kTile][i], static_cast<const uint8_t*>(from) + i * stride, row_bytes(kTile));
    }
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    require(state.config.palette == 1);
    for (int i = 0; i < rows(kTile); ++i) {
      std::memcpy(static_cast<uint8_t*>(to) + i * stride, state.tiles[kTile][i], row_bytes(kTile));
    }
  }

  template <int kSum, int kA, int kB>
  static void dot() {
    static_assert(kSum != kA && kSum != kB && kA != kB);
    require(state.config.palette == 1 && rows(kSum) == rows(kA) && row_bytes(kSum) == row_bytes(kB) &&
            row_bytes(kA) == 4 * rows(kB));
    // As in the instruction, denormal operands and results count as zeros and sums round to nearest even, whatever the
    // caller's mode is.
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(0x9fc0);
    dot_rows(state.tiles[kSum], state.tiles[kA], state.tiles[kB], rows(kSum), rows(kB), row_bytes(kB) / 4);
    _mm_setcsr(mode);
  }

  /// In a row, the products of the pairs' first halves are one chain of fused multiply-adds. Those of the second halves
  /// are another. The sum of the two chains is added to the tile.
  [[gnu::noinline]] static void dot_rows(uint8_t (*sums)[64], const uint8_t (*a)[64], const uint8_t (*b)[64], int rows,
                                         int pairs, int columns) {
    for (int i = 0; i < rows; ++i) {
      float first[16] = {}, second[16] = {}, sum[16];
      for (int k = 0; k < pairs; ++k) {
        const uint32_t left = word(a[i], k);
        for (int j = 0; j < columns; ++j) {
          const uint32_t right = word(b[k], j);
          first[j] = __builtin_fmaf(float_of(left << 16), float_of(right << 16), first[j]);
          second[j] = __builtin_fmaf(float_of(left & 0xffff0000), float_of(right & 0xffff0000), second[j]);
        }
      }
      std::memcpy(sum, sums[i], sizeof(sum));
      for (int j = 0; j < columns; ++j) sum[j] = sum[j] + (first[j] + second[j]);
      std::memcpy(sums[i], sum, 4 * columns);
    }
  }
  static uint32_t word(const uint8_t* row, int index) {
    uint32_t bits;
    std::memcpy(&bits, row + 4 * index, sizeof(bits));
    return bits;
  }
};

}  // namespace
}  // namespace lumos
