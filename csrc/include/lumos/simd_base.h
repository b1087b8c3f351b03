// Four floats in the compiler's own vectors: runs on every CPU. The vocabulary is that of simd_avx2.h and simd_avx512.h.
//
// The anonymous namespace is the point: each simd_*.h is included by files compiled for one instruction set, and what
// they instantiate must never be merged by the linker with another file's copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "lumos/half.h"

namespace lumos {
namespace {

struct Vec {
  static constexpr int kLanes = 4;
  typedef float Data __attribute__((vector_size(16)));
  Data v;
};

inline Vec broadcast(float x) { return {Vec::Data{x, x, x, x}}; }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }

/// a * b + c and a * b - c. Without FMA instructions they round twice.
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {a.v * b.v - c.v}; }

inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

inline Vec load(const float* from) {
  Vec a;
  std::memcpy(&a.v, from, sizeof(a.v));
  return a;
}
inline Vec load(const BFloat16* from) {
  return {Vec::Data{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])}};
}
inline Vec load(const Half* from) {
  return {Vec::Data{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])}};
}

inline void store(float* to, Vec a) { std::memcpy(to, &a.v, sizeof(a.v)); }
inline void store(BFloat16* to, Vec a) {
  for (int i = 0; i < Vec::kLanes; ++i) to[i] = to_bfloat16(a.v[i]);
}
inline void store(Half* to, Vec a) {
  for (int i = 0; i < Vec::kLanes; ++i) to[i] = to_half(a.v[i]);
}

}  // namespace
}  // namespace lumos
