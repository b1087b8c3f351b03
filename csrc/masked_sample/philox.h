// Philox4x32-10 for 64 columns of a row at once: lumos_kernels/masked_sample/philox.py in vectors.
//
// A 64-bit lane serves one group of four columns, because every x86-64 vector set multiplies 32 by 32 bits within such
// lanes. The upper half of a lane is left dirty between rounds: the multiplication does not read it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lumos {
namespace {

#if defined(__AVX512F__)

struct Words {
  static constexpr int kLanes = 8;
  __m512i v;
};
inline Words load_words(const uint64_t* from) { return {_mm512_loadu_si512(from)}; }
inline void store_words(uint32_t* to, Words a) { _mm512_storeu_si512(to, a.v); }
inline Words every_lane(uint64_t x) { return {_mm512_set1_epi64(static_cast<int64_t>(x))}; }
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
inline Words every_lane(uint64_t x) { return {_mm256_set1_epi64x(static_cast<int64_t>(x))}; }
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
inline Words every_lane(uint64_t x) { return {_mm_set1_epi64x(static_cast<int64_t>(x))}; }
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

/// The stream of one row: its key schedule and the two middle words of its counter.
struct PhiloxRow {
  uint64_t key[kRounds][2];
  uint64_t counter[2];

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

  /// The words of columns 4 * group .. 4 * group + 63.
  void words(uint64_t group, uint32_t* to) const {
    // Pairs of lanes hold groups g and g + kLanes / 2, so that even_lanes and odd_lanes put the columns in order.
    alignas(64) uint64_t offsets[Words::kLanes];
    for (int i = 0; i < Words::kLanes; ++i) offsets[i] = i / 2 + i % 2 * (Words::kLanes / 2);
    const Words offset = load_words(offsets);
    for (int64_t at = 0; at < kPhiloxColumns; at += 4 * Words::kLanes) {
      Words c0 = every_lane(group + at / 4) + offset, c1 = every_lane(counter[0]);
      Words c2 = every_lane(counter[1]), c3 = every_lane(0);
      for (int round = 0; round < kRounds; ++round) {
        const Words first = multiply_low_halves(c0, every_lane(0xD2511F53));
        const Words second = multiply_low_halves(c2, every_lane(0xCD9E8D57));
        c0 = high_half(second) ^ c1 ^ every_lane(key[round][0]);
        c2 = high_half(first) ^ c3 ^ every_lane(key[round][1]);
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
