// What both passes of frame attention use. No functions of the standard library here: the linker would merge them with
// other files' copies (see views.h).
#pragma once

#include <math.h>
#include <sched.h>

#include <cstdint>

#include "frame_attention_matmul.h"
#include "lumos/frame_attention.h"

namespace lumos {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kInfinity = __builtin_inff();
constexpr float kTiny = __FLT_MIN__;  // makes a scale of 0 keep what is masked at -infinity
constexpr int64_t kColumns = 32;  // columns of a matmul come in multiples of this

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

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
