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
  template <class Value = float>
  Value* take(int64_t count) {
    float* piece = scratch_ ? scratch_ + taken_ : nullptr;
    taken_ += round_up(count * static_cast<int64_t>(sizeof(Value)), 64) / static_cast<int64_t>(sizeof(float));
    return reinterpret_cast<Value*>(piece);
  }
  int64_t taken() const { return taken_; }

 private:
  float* scratch_;
  int64_t taken_ = 0;
};

/// Returns what the queries [query, query + count) see.
inline Visible visible_keys(const FrameAttentionProblem& x, int64_t query, int64_t count) {
  Visible seen = {x.keys, 0, 0, x.keys};
  for (int64_t i = query; i < query + count; ++i) {
    const int64_t start = x.kv_start[i], end = x.kv_end[i];
    seen.first = start < end ? smaller(seen.first, start) : seen.first;
    seen.end = start < end ? larger(seen.end, end) : seen.end;
    seen.whole_first = larger(seen.whole_first, start);
    seen.whole_end = smaller(seen.whole_end, end);
  }
  return seen;
}

/// Which keys of a block are seen by some query. Keys that nobody sees may hold anything, and 0 * NaN is NaN, so they
/// are packed as zeros.
class SeenKeys {
 public:
  /// `marks` holds count + 1 values.
  SeenKeys(int64_t key, int64_t count, int32_t* marks) : key_(key), count_(count), marks_(marks) {
    for (int64_t i = 0; i <= count; ++i) marks[i] = 0;
  }
  /// Adds the queries [query, query + count). Nothing is left to do once one of them has seen the whole block.
  void add(const FrameAttentionProblem& x, int64_t query, int64_t count) {
    for (int64_t i = query; i < query + count && !all_; ++i) {
      const int64_t start = larger(x.kv_start[i] - key_, 0), end = smaller(x.kv_end[i] - key_, count_);
      if (start >= end) continue;
      all_ = end - start == count_;
      ++marks_[start];
      --marks_[end];
    }
  }
  /// Turns the marks into 1 for a key that is seen and 0 for another.
  const int32_t* finish() {
    int32_t queries = 0;
    for (int64_t i = 0; i < count_; ++i) {
      queries += marks_[i];
      marks_[i] = all_ || queries > 0;
    }
    return marks_;
  }

 private:
  int64_t key_, count_;
  int32_t* marks_;
  bool all_ = false;
};

}  // namespace
}  // namespace lumos
