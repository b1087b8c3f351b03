// Constants and helpers of both passes of frame attention. They call no inline functions of the standard library: the
// linker would merge those with other files' copies (see views.h).
#pragma once

#include <math.h>
#include <sched.h>

#include <cstdint>

#include "frame_attention/matmul.h"
#include "frame_attention/problem.h"

namespace lumos {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kInfinity = __builtin_inff();
/// The smallest normal float. Added to |scale|, it keeps masked scores at -infinity where scale is 0 (0 * inf is NaN).
constexpr float kTiny = __FLT_MIN__;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// Prefetches `count` values, into L1 with kCache 3 and into L2 with kCache 2.
///
/// GCC takes a function that only prefetches for one without effect and drops its calls, so it is always inlined.
template <int kCache, class T>
[[gnu::always_inline]] inline void prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, kCache);
}

/// Prefetches the row of a token and head.
template <int kCache, class T>
[[gnu::always_inline]] inline void prefetch_row(const ConstHeads& x, int64_t token, int64_t head, int64_t head_dim) {
  prefetch<kCache>(static_cast<const T*>(x.data) + token * x.token_stride + head * x.head_stride, head_dim);
}

/// Hands out aligned pieces of the scratch. With a null scratch it only measures their size.
class Arena {
 public:
  explicit Arena(float* scratch) : scratch_(scratch) {}
  float* take(int64_t floats) {
    float* piece = scratch_ ? scratch_ + taken_ : nullptr;
    taken_ += round_up(floats, 16);
    return piece;
  }
  int64_t taken() const { return taken_; }

 private:
  float* scratch_;
  int64_t taken_ = 0;
};

}  // namespace
}  // namespace lumos
