// The storage types bfloat16 and IEEE half, with the conversions of half for CPUs without F16C.
#pragma once

#include <cstdint>
#include <cstring>

namespace lumos {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// These functions are internal to each file, like all code that several instruction sets compile (see base.h).
namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

/// The 15 bits below the sign, shifted to their place in a float, give a value that is 2^112 too small. This holds for
/// subnormals, too.
inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const bool finite = magnitude < (0x7c00u << 13);
  const uint32_t scaled = finite ? bits_of(float_of(magnitude) * 0x1p112f) : magnitude | 0x7f800000;
  return float_of(sign | scaled);
}

inline Half to_half(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  const uint32_t bits = bits_of(x) & 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (bits >= 0x477ff000) {
    half = 0x7c00;  // 65520 and more round to infinity
  } else if (bits < 0x38800000) {
    // The half is subnormal. Adding 0.5 puts its last bit, 2^-24, at the last bit of the float, which rounds it.
    half = bits_of(float_of(bits) + 0.5f) - 0x3f000000;
  } else {
    half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace
}  // namespace lumos
