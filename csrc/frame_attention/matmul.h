// The matmul of frame attention in vector registers, out of packed words (operands.h), with fp32 sums:
//     C[m, n] = (0, C[m, n] or factor[m] C[m, n]) + sum over k of A[m, k] B[k, n].
//
// A register block of kBlockRows x kBlockVecs vectors of C is summed over all of k. Each step loads kBlockVecs vectors
// of B, and broadcasts one word of A for each row. `panel` walks down the rows of a block column, `matmul_run` over the
// columns.
#pragma once

#include "frame_attention/operands.h"

namespace lumos {
namespace {

enum class Start { zero, sum, scaled };  // the sums start at zero, at C, or at C times a factor for each row

/// The rows of a register block. 6 x 4 vectors take 24 of AVX-512's 32 registers, 6 x 2 take 12 of the 16 elsewhere.
constexpr int kBlockRows = 6;
#if defined(__AVX512F__)
constexpr int kBlockVecs = 4;
#else
constexpr int kBlockVecs = 2;
#endif

template <class M, int kRows, int kVecs, Start kStart>
inline void block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t steps, float* c,
                  int64_t c_stride, const float* factors) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) sums[i][j] = broadcast(0.0f);
  }
  for (int64_t k = 0; k < steps; ++k, b += b_stride) {
    Vec right[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Vec left = broadcast(a[i * a_stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sums[i][j] = M::dot(sums[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      float* to = c + i * c_stride + j * kLanes;
      // C is added at the end. With C as the initial sum, small terms would lose more bits.
      if constexpr (kStart == Start::sum) sums[i][j] = load(to) + sums[i][j];
      if constexpr (kStart == Start::scaled) sums[i][j] = fma(load(to), broadcast(factors[i]), sums[i][j]);
      store(to, sums[i][j]);
    }
  }
}

template <class M, int kVecs, Start kStart>
inline void panel(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t steps,
                  float* c, int64_t c_stride, const float* factors) {
  int64_t i = 0;
  for (; i + kBlockRows <= rows; i += kBlockRows) {
    block<M, kBlockRows, kVecs, kStart>(a + i * a_stride, a_stride, b, b_stride, steps, c + i * c_stride, c_stride,
                                        kStart == Start::scaled ? factors + i : nullptr);
  }
  for (; i < rows; i += 2) {
    block<M, 2, kVecs, kStart>(a + i * a_stride, a_stride, b, b_stride, steps, c + i * c_stride, c_stride,
                               kStart == Start::scaled ? factors + i : nullptr);
  }
}

template <class M, Start kStart>
[[gnu::noinline]] void matmul_run(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                                  int64_t columns, int64_t steps, float* c, int64_t c_stride, const float* factors) {
  constexpr int kWide = kBlockVecs * kLanes;
  int64_t j = 0;
  for (; j + kWide <= columns; j += kWide) {
    panel<M, kBlockVecs, kStart>(a, a_stride, b + j, b_stride, rows, steps, c + j, c_stride, factors);
  }
  for (; j < columns; j += 2 * kLanes) {
    panel<M, 2, kStart>(a, a_stride, b + j, b_stride, rows, steps, c + j, c_stride, factors);
  }
}

/// A way to compute (M in the kernels): its words, the tile sizes that suit its matmul, and the matmul.
template <class Words>
struct Vectors : Words {
  static constexpr int64_t kRows = kBlockRows;  // query rows of a row block of forward
  /// The tiles of backward. They are fixed, and with them the order of every sum. A key tile packs every query that it
  /// sees and adds to all of dq, so larger tiles do less of both: in bf16, 384 keys took 6 to 8 % less time than 192
  /// (Zen 4).
  static constexpr int64_t kQueryTile = 128, kKeyTile = Words::kStep == 2 ? 384 : 192;
  static constexpr int64_t kKeyStep = 4 * kBlockRows;  // keys of backward that are computed, or skipped, together
  static constexpr bool kFixedReference = Words::kStep == 2;  // saves 3 % of forward's time in bf16; see forward.h

  /// Returns the query tokens of an item of forward: about 384 rows share a packed block of keys, whatever the group.
  static int64_t forward_tile(int64_t group) {
    const int64_t tokens = (384 / group + kRows - 1) / kRows * kRows;
    return tokens < 4 * kRows ? 4 * kRows : tokens;
  }

  /// Returns the keys of a block of forward. Its K and V, 32 KB in bf16, stay near L1 while all rows of the item pass.
  static int64_t key_block(int64_t head_dim) { return head_dim <= 64 ? 128 : 64; }

  static void begin() {}
  static void end() {}

  /// Computes C [rows, columns] from A [rows, steps] and B [steps, columns] in words. The rows are even, the columns a
  /// multiple of 32.
  ///
  /// fp32 sums the steps in runs of 16 or 32: with one long chain the error was 2 to 3 times that of torch's matmul.
  template <Start kStart>
  static void matmul(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t columns,
                     int64_t steps, float* c, int64_t c_stride, const float* factors = nullptr) {
    constexpr int64_t kRun = Words::kStep == 2 ? INT64_MAX : kStart == Start::zero ? 16 : 32;
    const int64_t run = steps < kRun ? steps : kRun;
    matmul_run<Words, kStart>(a, a_stride, b, b_stride, rows, columns, run, c, c_stride, factors);
    for (int64_t k = run; k < steps; k += kRun) {
      const int64_t left = steps - k < kRun ? steps - k : kRun;
      matmul_run<Words, Start::sum>(a + k, a_stride, b + k * b_stride, b_stride, rows, columns, left, c, c_stride,
                                    nullptr);
    }
  }
};

using Fp32 = Vectors<Fp32Words>;
#if defined(LUMOS_AVX512_BF16)
using Bf16 = Vectors<Bf16Words>;
#endif

}  // namespace
}  // namespace lumos
