// What both passes of frame attention use. No functions of the standard library here: the linker would merge them with
// other files' copies (see views.h).
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
constexpr float kTiny = __FLT_MIN__;  // makes a scale of 0 keep what is masked at -infinity

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// Starts to bring floats from memory while the arithmetic goes on; kCache 3 into L1, 2 into L2.
///
/// Inlined by force: GCC takes a function that only prefetches for one without effect, and drops its calls.
template <int kCache, class T>
[[gnu::always_inline]] inline void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, kCache);
}

/// The same for the row of a token and head.
template <int kCache, class T>
[[gnu::always_inline]] inline void fetch_row(const ConstHeads& x, int64_t token, int64_t head, int64_t head_dim) {
  fetch<kCache>(static_cast<const T*>(x.data) + token * x.token_stride + head * x.head_stride, head_dim);
}

/// Hands out aligned pieces of the scratch; from address 0 it measures how much that is.
class Pieces {
 public:
  explicit Pieces(float* scratch) : scratch_(scratch) {}
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
