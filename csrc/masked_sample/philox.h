// Philox4x32-10 for 64 columns of a row at once: the random words of lumos_kernels/masked_sample/philox.py in vectors.
//
// Columns 4 g .. 4 g + 3 form group g. Their words are the four counter words after ten rounds, which start from
//     c = (g, counter low, counter high, 0),   k = (seed low, seed high)
// and compute, with 32-bit words and high/low the halves of a 64-bit product,
//     c = (high(M1 c2) ^ c1 ^ k0,  low(M1 c2),  high(M0 c0) ^ c3 ^ k1,  low(M0 c0))
//     k = (k0 + W0, k1 + W1)
//
// A group has one 64-bit lane in each of four vectors, c0 .. c3: every x86-64 vector set can multiply 32 by 32 bits
// within such lanes. A round leaves arbitrary bits in the upper halves of the lanes. Only low halves reach the result:
// multiply_low_halves and low_halves_of read no upper half.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lumos {
namespace {

// low_halves_of(a, b) puts, in each 64-bit lane, the low half of a below the low half of b. even_lanes(a, b) returns
// lane 0 of a, lane 0 of b, lane 2 of a, lane 2 of b, and so on; odd_lanes(a, b) does the same with lanes 1, 3, ...
#if defined(__AVX512F__)

struct Words {
  static constexpr int kLanes = 8;
  __m512i v;
};
inline Words load_words(const uint64_t* from) { return {_mm512_loadu_si512(from)}; }
inline void store_words(uint32_t* to, Words a) { _mm512_storeu_si512(to, a.v); }
inline Words broadcast_word(uint64_t x) { return {_mm512_set1_epi64(static_cast<int64_t>(x))}; }
inline Words operator+(Words a, Words b) { return {_mm512_add_epi64(a.v, b.v)}; }
inline Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Words multiply_low_halves(Words a, Words b) { return {_mm512_mul_epu32(a.v, b.v)}; }
inline Words high_half(Words a) { return {_mm512_srli_epi64(a.v, 32)}; }
inline Words low_halves_of(Words a, Words b) {
  return {_mm512_mask_mov_epi32(a.v, 0xaaaa, _mm512_slli_epi64(b.v, 32))};
}
inline Words even_lanes(Words a, Words b) { return {_mm512_unpacklo_epi64(a.v, b.v)}; }
inline Words odd_lanes(Words a, Words b) { return {_mm512_unpackhi_epi64(a.v, b.v)}; }

#elif defined(__AVX2__)

struct Words {
  static constexpr int kLanes = 4;
  __m256i v;
};
inline Words load_words(const uint64_t* from) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))}; }
inline void store_words(uint32_t* to, Words a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a.v); }
inline Words broadcast_word(uint64_t x) { return {_mm256_set1_epi64x(static_cast<int64_t>(x))}; }
inline Words operator+(Words a, Words b) { return {_mm256_add_epi64(a.v, b.v)}; }
inline Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Words multiply_low_halves(Words a, Words b) { return {_mm256_mul_epu32(a.v, b.v)}; }
inline Words high_half(Words a) { return {_mm256_srli_epi64(a.v, 32)}; }
inline Words low_halves_of(Words a, Words b) {
  return {_mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xaa)};
}
inline Words even_lanes(Words a, Words b) { return {_mm256_unpacklo_epi64(a.v, b.v)}; }
inline Words odd_lanes(Words a, Words b) { return {_mm256_unpackhi_epi64(a.v, b.v)}; }

#else

struct Words {
  static constexpr int kLanes = 2;
  __m128i v;
};
inline Words load_words(const uint64_t* from) { return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))}; }
inline void store_words(uint32_t* to, Words a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), a.v); }
inline Words broadcast_word(uint64_t x) { return {_mm_set1_epi64x(static_cast<int64_t>(x))}; }
inline Words operator+(Words a, Words b) { return {_mm_add_epi64(a.v, b.v)}; }
inline Words operator^(Words a, Words b) { return {_mm_xor_si128(a.v, b.v)}; }
inline Words multiply_low_halves(Words a, Words b) { return {_mm_mul_epu32(a.v, b.v)}; }
inline Words high_half(Words a) { return {_mm_srli_epi64(a.v, 32)}; }
inline Words low_halves_of(Words a, Words b) {
  return {_mm_or_si128(_mm_srli_epi64(_mm_slli_epi64(a.v, 32), 32), _mm_slli_epi64(b.v, 32))};
}
inline Words even_lanes(Words a, Words b) { return {_mm_unpacklo_epi64(a.v, b.v)}; }
inline Words odd_lanes(Words a, Words b) { return {_mm_unpackhi_epi64(a.v, b.v)}; }

#endif

constexpr int kRounds = 10;
constexpr int64_t kPhiloxColumns = 64;

/// The random stream of one row.
struct PhiloxRow {
  uint64_t key[kRounds][2];  // the key of each round
  uint64_t counter[2];       // the two middle words of the counter

  explicit PhiloxRow(const int64_t* seed_and_counter) {
    const uint64_t seed = static_cast<uint64_t>(seed_and_counter[0]);
    const uint64_t number = static_cast<uint64_t>(seed_and_counter[1]);
    for (uint32_t round = 0; round < kRounds; ++round) {
      key[round][0] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
      key[round][1] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
      for (uint64_t& word : key[round]) word &= 0xffffffff;
    }
    counter[0] = number & 0xffffffff;
    counter[1] = number >> 32;
  }

  /// Writes the words of columns 4 * group .. 4 * group + 63, in order.
  void words(uint64_t group, uint32_t* to) const {
    // Lanes 2 i and 2 i + 1 hold groups i and i + kLanes / 2: then even_lanes yields the columns of the first half of
    // the groups in order, and odd_lanes those of the second half.
    alignas(64) uint64_t offsets[Words::kLanes];
    for (int i = 0; i < Words::kLanes; ++i) offsets[i] = i / 2 + i % 2 * (Words::kLanes / 2);
    const Words offset = load_words(offsets);
    for (int64_t at = 0; at < kPhiloxColumns; at += 4 * Words::kLanes) {
      Words c0 = broadcast_word(group + at / 4) + offset, c1 = broadcast_word(counter[0]);
      Words c2 = broadcast_word(counter[1]), c3 = broadcast_word(0);
      for (int round = 0; round < kRounds; ++round) {
        const Words first = multiply_low_halves(c0, broadcast_word(0xD2511F53));
        const Words second = multiply_low_halves(c2, broadcast_word(0xCD9E8D57));
        c0 = high_half(second) ^ c1 ^ broadcast_word(key[round][0]);
        c2 = high_half(first) ^ c3 ^ broadcast_word(key[round][1]);
        c1 = second;
        c3 = first;
      }
      const Words front = low_halves_of(c0, c1), back = low_halves_of(c2, c3);
      store_words(to + at, even_lanes(front, back));
      store_words(to + at + 2 * Words::kLanes, odd_lanes(front, back));
    }
  }
};

}  // namespace
}  // namespace lumos
