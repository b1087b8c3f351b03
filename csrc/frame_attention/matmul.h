// The matmul of frame attention in vector registers, with A and B packed in words (see operands.h) and fp32 sums:
//     C[m, n] = A[m, k] B[k, n]                         Update::assign
//     C[m, n] = C[m, n] + A[m, k] B[k, n]               Update::add
//     C[m, n] = factors[m] C[m, n] + A[m, k] B[k, n]    Update::scale_and_add
//
// The columns of C are cut into panels of kBlockVecs vectors, and a panel into register blocks of kBlockRows rows. A
// register block keeps its part of C in registers through all steps of k.
#pragma once

#include "frame_attention/operands.h"

namespace lumos {
namespace {

enum class Update { assign, add, scale_and_add };

/// The sums of a register block, 6 rows by 4 vectors, fill 24 of AVX-512's 32 registers. Elsewhere 6 rows by 2 vectors
/// fill 12 of 16.
constexpr int kBlockRows = 6;
#if defined(__AVX512F__)
constexpr int kBlockVecs = 4;
#else
constexpr int kBlockVecs = 2;
#endif

template <class M, int kRows, int kVecs, Update kUpdate>
inline void register_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t steps, float* c,
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
      // C is added last. If every step were summed into it, small terms would lose more bits.
      if constexpr (kUpdate == Update::add) sums[i][j] = load(to) + sums[i][j];
      if constexpr (kUpdate == Update::scale_and_add) sums[i][j] = fma(load(to), broadcast(factors[i]), sums[i][j]);
      store(to, sums[i][j]);
    }
  }
}

template <class M, int kVecs, Update kUpdate>
inline void panel(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t steps,
                  float* c, int64_t c_stride, const float* factors) {
  int64_t i = 0;
  for (; i + kBlockRows <= rows; i += kBlockRows) {
    register_block<M, kBlockRows, kVecs, kUpdate>(a + i * a_stride, a_stride, b, b_stride, steps, c + i * c_stride,
                                                  c_stride, kUpdate == Update::scale_and_add ? factors + i : nullptr);
  }
  for (; i < rows; i += 2) {
    register_block<M, 2, kVecs, kUpdate>(a + i * a_stride, a_stride, b, b_stride, steps, c + i * c_stride, c_stride,
                                         kUpdate == Update::scale_and_add ? factors + i : nullptr);
  }
}

template <class M, Update kUpdate>
[[gnu::noinline]] void matmul_vectors(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                                      int64_t columns, int64_t steps, float* c, int64_t c_stride,
                                      const float* factors) {
  constexpr int kWide = kBlockVecs * kLanes;
  int64_t j = 0;
  for (; j + kWide <= columns; j += kWide) {
    panel<M, kBlockVecs, kUpdate>(a, a_stride, b + j, b_stride, rows, steps, c + j, c_stride, factors);
  }
  for (; j < columns; j += 2 * kLanes) {
    panel<M, 2, kUpdate>(a, a_stride, b + j, b_stride, rows, steps, c + j, c_stride, factors);
  }
}

/// The parameter M of the kernels: the words, the tile sizes that suit the matmul, and the matmul. TileMath in tiles.h
/// has the same members.
template <class Words>
struct VectorMath : Words {
  static constexpr int64_t kRows = kBlockRows;  // rows of a row block of forward
  /// The tiles of backward. They are constants, and with them the order of every sum is fixed. A key tile packs every
  /// query that it sees and adds to all of dq. In bf16, 384 keys took 6 to 8 % less time than 192 (Zen 4).
  static constexpr int64_t kQueryTile = 128, kKeyTile = Words::kStep == 2 ? 384 : 192;
  static constexpr int64_t kKeyStep = 4 * kBlockRows;  // keys that backward computes, or skips, together
  /// Says that forward may use the fixed reference (see forward.h), which saves 3 % of its time in bf16.
  static constexpr bool kFixedReference = Words::kStep == 2;

  /// Returns the query tokens of an item of forward. About 384 rows share a packed block of keys, for any group.
  static int64_t forward_tile(int64_t group) {
    const int64_t tokens = (384 / group + kRows - 1) / kRows * kRows;
    return tokens < 4 * kRows ? 4 * kRows : tokens;
  }

  /// Returns the keys of a block of forward. Its K and V, 32 KB in bf16, stay near L1 while all rows of the item pass.
  static int64_t key_block(int64_t head_dim) { return head_dim <= 64 ? 128 : 64; }

  static void begin() {}
  static void end() {}

  /// Updates C [rows, columns] with A [rows, steps] and B [steps, columns] in words. rows is even, columns a multiple
  /// of 32.
  ///
  /// In fp32, runs of kRun steps are summed and then added to C. One chain over all steps had an error of 2 to 3 times
  /// that of torch's matmul.
  template <Update kUpdate>
  static void matmul(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t columns,
                     int64_t steps, float* c, int64_t c_stride, const float* factors = nullptr) {
    constexpr int64_t kRun = Words::kStep == 2 ? INT64_MAX : kUpdate == Update::assign ? 16 : 32;
    const int64_t run = steps < kRun ? steps : kRun;
    matmul_vectors<Words, kUpdate>(a, a_stride, b, b_stride, rows, columns, run, c, c_stride, factors);
    for (int64_t k = run; k < steps; k += kRun) {
      const int64_t left = steps - k < kRun ? steps - k : kRun;
      matmul_vectors<Words, Update::add>(a + k, a_stride, b + k * b_stride, b_stride, rows, columns, left, c, c_stride,
                                         nullptr);
    }
  }
};

using Fp32 = VectorMath<Fp32Words>;
#if defined(LUMOS_AVX512_BF16)
using Bf16 = VectorMath<Bf16Words>;
#endif

}  // namespace
}  // namespace lumos
