// The kernels of mm_rope. base.cpp, avx2.cpp and avx512.cpp include the vectors of simd/<isa>.h, then this file.
//
//     x_hat = (x - mean(x)) * rstd,   y = x_hat * weight + bias,   h = D/2,   i < h
//     out[i] = y[i] * cos_i - y[i + h] * sin_i,   out[i + h] = y[i + h] * cos_i + y[i] * sin_i
//
// Backward rotates the gradient of out back to dy. With g = dy * weight,
//     dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),   dweight = sum(dy * x_hat),   dbias = sum(dy).
//
// A head of D channels is D / kLanes vectors, and vector i rotates with vector i + half. A token's heads go through in
// groups of kGroup. The anonymous namespace keeps every instantiation inside its own file (see simd/base.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "mm_rope/problem.h"

namespace lumos {
namespace {

inline uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline double double_of(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

/// Replaces each angle by its cosine and sine, correctly rounded but for one case in hundreds, for |angle| < 2^31.
///
/// The loop has no branches, so that the compiler vectorises it on every instruction set, and no FMA, so that all of
/// them give the same bits. It computes in double. pi/2 is split into three parts: the first two have 22 bits, so that
/// their products with the quadrant (31 bits) are exact.
inline void cos_sin(float* __restrict angle_then_cos, float* __restrict sin_out, int64_t count) {
  constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
  constexpr double kHalfPi1 = 0x1.921fbp+0, kHalfPi2 = 0x1.5110bp-22, kHalfPi3 = 0x1.18469898cc517p-44;
  constexpr double kToInteger = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  for (int64_t i = 0; i < count; ++i) {
    const double angle = angle_then_cos[i];
    const double shifted = angle * kTwoOverPi + kToInteger;
    const uint64_t quadrant = bits_of(shifted);
    const double quarter_turns = shifted - kToInteger;
    const double r = ((angle - quarter_turns * kHalfPi1) - quarter_turns * kHalfPi2) - quarter_turns * kHalfPi3;
    const double r2 = r * r;
    // At pi/4 the errors of these Taylor series are 7e-12 and 6e-13.
    const double sin_tail = -1.0 / 6 + r2 * (1.0 / 120 + r2 * (-1.0 / 5040 + r2 * (1.0 / 362880 - r2 / 39916800)));
    const double sin = r + r * r2 * sin_tail;
    const double cos_tail =
        1.0 / 24 + r2 * (-1.0 / 720 + r2 * (1.0 / 40320 + r2 * (-1.0 / 3628800 + r2 / 479001600)));
    const double cos = 1.0 - 0.5 * r2 + r2 * r2 * cos_tail;
    const uint64_t odd = -(quadrant & 1);
    const uint64_t swapped_sin = (bits_of(sin) & ~odd) | (bits_of(cos) & odd);
    const uint64_t swapped_cos = (bits_of(cos) & ~odd) | (bits_of(sin) & odd);
    sin_out[i] = static_cast<float>(double_of(swapped_sin ^ (quadrant & 2) << 62));
    angle_then_cos[i] = static_cast<float>(double_of(swapped_cos ^ ((quadrant + 1) & 2) << 62));
  }
}

/// The number of heads that go through each step side by side. A single head waits for its sums and its square root:
/// 32 ns a head forward and 53 backward instead of 22 and 32 (AVX-512; AVX2 50 and 67 instead of 26 and 39; bf16,
/// D = 64, in cache, Zen 4). At 12,796 tokens non-temporal stores cost 20 % more (28 against 23 ns forward). The
/// conversion of AVX512_BF16 would save 15 %, but flushes subnormals.
constexpr int kGroup = 4;

/// The most vectors of a head to unroll for. With 32 of them (D = 128 on SSE2) one file took three minutes to compile.
constexpr int kMaxUnrolled = 8;

/// Runs body(0 .. count - 1). The loop is unrolled if the count is known (kCount), so that arrays stay in registers.
template <int kCount, class Body>
inline void repeat(int64_t count, Body body) {
  if constexpr (kCount == 0) {
    for (int64_t i = 0; i < count; ++i) body(i);
  } else {
#pragma GCC unroll 32
    for (int64_t i = 0; i < kCount; ++i) body(i);
  }
}

/// The vectors of kHeads heads. They lie in registers, or if kVectors = 0, any number of them in the given memory.
template <int kHeads, int kVectors>
struct Rows {
  Vec vectors[kHeads][kVectors];
  Rows(float*, int64_t) {}
  Vec get(int64_t head, int64_t i) const { return vectors[head][i]; }
  void set(int64_t head, int64_t i, Vec a) { vectors[head][i] = a; }
};

template <int kHeads>
struct Rows<kHeads, 0> {
  float* memory;
  int64_t head_dim;
  Rows(float* memory, int64_t head_dim) : memory(memory), head_dim(head_dim) {}
  Vec get(int64_t head, int64_t i) const { return load(memory + head * head_dim + i * Vec::kLanes); }
  void set(int64_t head, int64_t i, Vec a) { store(memory + head * head_dim + i * Vec::kLanes, a); }
};

/// One number for each head of a group.
struct PerHead {
  alignas(16) float value[kGroup];
  Vec operator[](int64_t head) const { return broadcast(value[head]); }
};

/// T is the storage type of q and k. kVectors is the number of vectors of a head, or 0 if only known at run time.
template <class T, int kVectors>
class MMRopeKernel {
 public:
  MMRopeKernel(const MMRopeProblem& problem, float* scratch)
      : problem_(problem),
        head_dim_(problem.head_dim),
        cos_(scratch),
        sin_(scratch + problem.head_dim / 2),
        rows_(scratch + problem.head_dim) {}

  // Not inlined: head sizes that share an instantiation share its code.
  [[gnu::noinline]] void forward(int64_t first_token, int64_t last_token) {
    for (int64_t token = first_token; token < last_token; ++token) {
      compute_cos_sin(token);
      for (const MMRopeTensor& tensor : problem_.tensors) {
        for (int64_t row = 0; row < norm_rows(tensor); ++row) forward_row(tensor, token, row);
      }
    }
  }

  [[gnu::noinline]] void backward(int64_t block, int64_t first_token, int64_t last_token) {
    for (const MMRopeTensor& tensor : problem_.tensors) clear_partials(tensor, block);
    for (int64_t token = first_token; token < last_token; ++token) {
      compute_cos_sin(token);
      for (const MMRopeTensor& tensor : problem_.tensors) {
        for (int64_t row = 0; row < norm_rows(tensor); ++row) backward_row(tensor, block, token, row);
      }
    }
  }

 private:
  int64_t vectors() const { return kVectors ? kVectors : head_dim_ / Vec::kLanes; }
  int64_t half() const { return vectors() / 2; }
  float channels() const { return static_cast<float>(kVectors ? kVectors * Vec::kLanes : head_dim_); }

  template <class Body>
  void each_vector(Body body) const {
    repeat<kVectors>(vectors(), body);
  }
  /// Vector i and vector i + half() hold the two channels of a pair.
  template <class Body>
  void each_pair(Body body) const {
    repeat<kVectors / 2>(half(), body);
  }

  static Vec load_vector(const T* from, int64_t i) { return load(from + i * Vec::kLanes); }
  static void store_vector(T* to, int64_t i, Vec a) { store(to + i * Vec::kLanes, a); }
  static Vec weight_vector(const float* from, int64_t i) { return load(from + i * Vec::kLanes); }

  static int64_t norm_rows(const MMRopeTensor& tensor) { return tensor.weight ? tensor.norm_rows : 1; }

  static const T* at(const ConstHeads& heads, int64_t token, int64_t head) {
    return static_cast<const T*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
  }
  static T* at(const Heads& heads, int64_t token, int64_t head) {
    return static_cast<T*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
  }

  /// Computes the cosines and sines of a token, which all its heads share.
  void compute_cos_sin(int64_t token) {
    float by_pair[16];
    for (int pair = 0; pair < 16; ++pair) {
      by_pair[pair] = static_cast<float>(
          problem_.positions[kMMRopeAxes[pair] * problem_.axis_stride + token * problem_.token_stride]);
    }
    // The fp32 product, rounded once, is the angle that the model was trained with.
    const int64_t pairs = head_dim_ / 2;
    for (int64_t pair = 0; pair < pairs; pair += 16) {
      for (int i = 0; i < 16; ++i) cos_[pair + i] = by_pair[i] * problem_.inv_freq[pair + i];
    }
    cos_sin(cos_, sin_, pairs);
  }
  Vec cos_of(int64_t i) const { return load(cos_ + i * Vec::kLanes); }
  Vec sin_of(int64_t i) const { return load(sin_ + i * Vec::kLanes); }

  /// Calls body(head, integral_constant of the number of heads) for the heads that row `row` of the norm serves.
  template <class Body>
  static void each_group(const MMRopeTensor& tensor, int64_t row, Body body) {
    const int64_t heads = tensor.heads / norm_rows(tensor);
    int64_t head = row * heads;
    for (; head + kGroup <= (row + 1) * heads; head += kGroup) body(head, Count<kGroup>{});
    for (; head < (row + 1) * heads; ++head) body(head, Count<1>{});
  }
  template <int kCount>
  struct Count {
    static constexpr int value = kCount;
  };

  /// Returns the mean over the channels of each head, given the sum of its vectors.
  template <int kHeads>
  PerHead mean(const Vec (&totals)[kHeads]) const {
    PerHead means;
    constexpr int second = kHeads > 1 ? 1 : 0, third = kHeads > 1 ? 2 : 0, fourth = kHeads > 1 ? 3 : 0;
    sum4(means.value, totals[0], totals[second], totals[third], totals[fourth]);
    for (float& value : means.value) value /= channels();
    return means;
  }

  /// Returns what is to be subtracted from each head to centre it, given its rounded mean.
  ///
  /// The rounded mean is off by some units in the last place of x. On a constant row that is all that is left of it, and
  /// rstd = eps^-1/2 makes it 300 times larger. So for fp32 this subtracts the rounded mean, and returns the mean of what
  /// is left. In half precision the result's own rounding is larger, and x stays as it is.
  template <int kHeads>
  PerHead refine(Rows<kHeads, kVectors>& x, const PerHead& rounded_mean) const {
    if constexpr (!std::is_same_v<T, float>) return rounded_mean;
    Vec totals[kHeads];
    repeat<kHeads>(kHeads, [&](int64_t head) {
      totals[head] = broadcast(0);
      each_vector([&](int64_t i) {
        x.set(head, i, x.get(head, i) - rounded_mean[head]);
        totals[head] = totals[head] + x.get(head, i);
      });
    });
    return mean(totals);
  }

  /// Replaces x by x_hat and returns rstd. A single pass would lose the variance of an x with a large mean, so that the
  /// variance takes a second pass.
  template <int kHeads>
  PerHead normalise(Rows<kHeads, kVectors>& x) const {
    Vec totals[kHeads], squares[kHeads];
    repeat<kHeads>(kHeads, [&](int64_t head) {
      totals[head] = broadcast(0);
      each_vector([&](int64_t i) { totals[head] = totals[head] + x.get(head, i); });
    });
    const PerHead mean_x = refine(x, mean(totals));
    repeat<kHeads>(kHeads, [&](int64_t head) {
      squares[head] = broadcast(0);
      each_vector([&](int64_t i) {
        const Vec centred = x.get(head, i) - mean_x[head];
        squares[head] = fma(centred, centred, squares[head]);
        x.set(head, i, centred);
      });
    });
    PerHead rstd = mean(squares);
    for (float& value : rstd.value) value = 1.0f / __builtin_sqrtf(value + problem_.eps);
    repeat<kHeads>(kHeads, [&](int64_t head) {
      each_vector([&](int64_t i) { x.set(head, i, x.get(head, i) * rstd[head]); });
    });
    return rstd;
  }

  void forward_row(const MMRopeTensor& tensor, int64_t token, int64_t row) const {
    each_group(tensor, row, [&](int64_t head, auto count) {
      forward_group<decltype(count)::value>(tensor, row, at(tensor.x, token, head), at(tensor.out, token, head));
    });
  }

  template <int kHeads>
  void forward_group(const MMRopeTensor& tensor, int64_t row, const T* from, T* to) const {
    Rows<kHeads, kVectors> y(rows_, head_dim_);
    repeat<kHeads>(kHeads, [&](int64_t head) {
      each_vector([&](int64_t i) { y.set(head, i, load_vector(from + head * tensor.x.head_stride, i)); });
    });
    if (tensor.weight) {
      const float *weight = tensor.weight + row * head_dim_, *bias = tensor.bias + row * head_dim_;
      normalise(y);
      each_vector([&](int64_t i) {
        const Vec w = weight_vector(weight, i), b = weight_vector(bias, i);
        repeat<kHeads>(kHeads, [&](int64_t head) { y.set(head, i, fma(y.get(head, i), w, b)); });
      });
    }
    each_pair([&](int64_t i) {
      const Vec cos = cos_of(i), sin = sin_of(i);
      repeat<kHeads>(kHeads, [&](int64_t head) {
        const Vec first = y.get(head, i), second = y.get(head, i + half());
        store_vector(to + head * tensor.out.head_stride, i, fms(first, cos, second * sin));
        store_vector(to + head * tensor.out.head_stride, i + half(), fma(second, cos, first * sin));
      });
    });
  }

  /// Runs backward for the heads that share a row of the norm. The gradients of weight and bias are summed over these
  /// heads in fp32 and over the tokens in double, so that a block's sum is as accurate as its terms.
  void backward_row(const MMRopeTensor& tensor, int64_t block, int64_t token, int64_t row) const {
    // Row 0 sums dweight, row 1 dbias.
    Rows<2, kVectors> norm_sums(rows_ + 2 * kGroup * head_dim_, head_dim_);
    each_vector([&](int64_t i) {
      norm_sums.set(0, i, broadcast(0));
      norm_sums.set(1, i, broadcast(0));
    });
    each_group(tensor, row, [&](int64_t head, auto count) {
      backward_group<decltype(count)::value>(tensor, row, at(tensor.grad, token, head), at(tensor.x, token, head),
                                             at(tensor.out, token, head), norm_sums);
    });
    if (!tensor.weight) return;
    double* sums = partials(tensor, block) + row * head_dim_;
    each_vector([&](int64_t i) {
      add_to(sums + i * Vec::kLanes, norm_sums.get(0, i));
      add_to(sums + tensor.norm_rows * head_dim_ + i * Vec::kLanes, norm_sums.get(1, i));
    });
  }

  template <int kHeads>
  void backward_group(const MMRopeTensor& tensor, int64_t row, const T* grad, const T* from, T* dx,
                      Rows<2, kVectors>& norm_sums) const {
    Rows<kHeads, kVectors> dy(rows_, head_dim_);
    each_pair([&](int64_t i) {
      const Vec cos = cos_of(i), sin = sin_of(i);
      repeat<kHeads>(kHeads, [&](int64_t head) {
        const T* head_grad = grad + head * tensor.grad.head_stride;
        const Vec first = load_vector(head_grad, i), second = load_vector(head_grad, i + half());
        dy.set(head, i, fma(first, cos, second * sin));
        dy.set(head, i + half(), fms(second, cos, first * sin));
      });
    });
    if (tensor.weight) norm_backward(tensor, row, from, dy, norm_sums);
    repeat<kHeads>(kHeads, [&](int64_t head) {
      each_vector([&](int64_t i) { store_vector(dx + head * tensor.out.head_stride, i, dy.get(head, i)); });
    });
  }

  /// Replaces dy by dx, and adds the heads' terms of dweight and dbias to norm_sums.
  template <int kHeads>
  void norm_backward(const MMRopeTensor& tensor, int64_t row, const T* from, Rows<kHeads, kVectors>& dy,
                     Rows<2, kVectors>& norm_sums) const {
    Rows<kHeads, kVectors> x_hat(rows_ + kGroup * head_dim_, head_dim_);
    repeat<kHeads>(kHeads, [&](int64_t head) {
      each_vector([&](int64_t i) { x_hat.set(head, i, load_vector(from + head * tensor.x.head_stride, i)); });
    });
    const PerHead rstd = normalise(x_hat);
    Vec sums_g[kHeads], sums_g_x_hat[kHeads];
    repeat<kHeads>(kHeads, [&](int64_t head) { sums_g[head] = sums_g_x_hat[head] = broadcast(0); });
    each_vector([&](int64_t i) {
      const Vec weight = weight_vector(tensor.weight + row * head_dim_, i);
      repeat<kHeads>(kHeads, [&](int64_t head) {
        const Vec g = dy.get(head, i) * weight;
        norm_sums.set(0, i, fma(dy.get(head, i), x_hat.get(head, i), norm_sums.get(0, i)));
        norm_sums.set(1, i, norm_sums.get(1, i) + dy.get(head, i));
        sums_g[head] = sums_g[head] + g;
        sums_g_x_hat[head] = fma(g, x_hat.get(head, i), sums_g_x_hat[head]);
        dy.set(head, i, g);
      });
    });
    const PerHead mean_g = refine(dy, mean(sums_g)), mean_g_x_hat = mean(sums_g_x_hat);
    repeat<kHeads>(kHeads, [&](int64_t head) {
      const Vec minus_mean = broadcast(-mean_g_x_hat.value[head]);
      each_vector([&](int64_t i) {
        dy.set(head, i, fma(x_hat.get(head, i), minus_mean, dy.get(head, i) - mean_g[head]) * rstd[head]);
      });
    });
  }

  double* partials(const MMRopeTensor& tensor, int64_t block) const {
    return tensor.partials + block * 2 * tensor.norm_rows * head_dim_;
  }

  void clear_partials(const MMRopeTensor& tensor, int64_t block) const {
    if (!tensor.weight) return;
    double* sums = partials(tensor, block);
    for (int64_t i = 0; i < 2 * tensor.norm_rows * head_dim_; ++i) sums[i] = 0;
  }

  static void add_to(double* sums, Vec a) {
    float lanes[Vec::kLanes];
    store(lanes, a);
    for (int lane = 0; lane < Vec::kLanes; ++lane) sums[lane] += lanes[lane];
  }

  const MMRopeProblem& problem_;
  const int64_t head_dim_;
  float* const cos_;   // [D/2]
  float* const sin_;   // [D/2]
  float* const rows_;  // [2 * kGroup + 2, D]: dy, x_hat, dweight and dbias, if kVectors = 0
};

/// The number of vectors of a head of kHeadDim channels, or 0 if they are too many to unroll.
template <int kHeadDim>
constexpr int kVectorsOf = kHeadDim / Vec::kLanes <= kMaxUnrolled ? kHeadDim / Vec::kLanes : 0;

/// Calls `run` with the kernel for the storage type T and the head size.
template <class T, class Run>
void with_head_dim(const MMRopeProblem& problem, float* scratch, Run run) {
  switch (problem.head_dim) {
    case 32:
      return run(MMRopeKernel<T, kVectorsOf<32>>(problem, scratch));
    case 64:
      return run(MMRopeKernel<T, kVectorsOf<64>>(problem, scratch));
    case 96:
      return run(MMRopeKernel<T, kVectorsOf<96>>(problem, scratch));
    case 128:
      return run(MMRopeKernel<T, kVectorsOf<128>>(problem, scratch));
    default:
      return run(MMRopeKernel<T, 0>(problem, scratch));
  }
}

template <class Run>
void with_kernel(const MMRopeProblem& problem, float* scratch, Run run) {
  switch (problem.dtype) {
    case Dtype::bf16:
      return with_head_dim<BFloat16>(problem, scratch, run);
    case Dtype::fp16:
      return with_head_dim<Half>(problem, scratch, run);
    case Dtype::fp32:
      return with_head_dim<float>(problem, scratch, run);
  }
}

void forward(const MMRopeProblem& problem, int64_t first_token, int64_t last_token, float* scratch) {
  with_kernel(problem, scratch, [&](auto kernel) { kernel.forward(first_token, last_token); });
}

void backward(const MMRopeProblem& problem, int64_t block, int64_t first_token, int64_t last_token, float* scratch) {
  with_kernel(problem, scratch, [&](auto kernel) { kernel.backward(block, first_token, last_token); });
}

}  // namespace
}  // namespace lumos
