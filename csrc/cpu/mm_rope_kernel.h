// MM-RoPE written once over the vocabulary of simd_*.h; each mm_rope_<isa>.cpp includes one of those, then this.
//
// A head of D channels is D / kLanes vectors. Channel i turns with channel i + D/2, so vector i turns with vector
// i + half. In backward, with x_hat the normalised x and g = dy * weight,
//     dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),   dweight = sum(dy * x_hat),   dbias = sum(dy).
// The anonymous namespace keeps every instantiation inside its own file (see simd_base.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "lumos/mm_rope.h"

namespace lumos {
namespace {

// ---- angles ----

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
/// In double, without branches, so that the compiler vectorises the loop on every instruction set, and without FMA, so
/// that all of them give the same bits. pi/2 comes in three parts: the first two have 22 bits, so that their products
/// with the quadrant (31 bits) are exact.
inline void cos_sin(float* __restrict angle_then_cos, float* __restrict sin_out, int64_t count) {
  constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
  constexpr double kHalfPi1 = 0x1.921fbp+0, kHalfPi2 = 0x1.5110bp-22, kHalfPi3 = 0x1.18469898cc517p-44;
  constexpr double kToInteger = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  for (int64_t i = 0; i < count; ++i) {
    const double angle = angle_then_cos[i];
    const double shifted = angle * kTwoOverPi + kToInteger;
    const uint64_t quadrant = bits_of(shifted);
    const double turns = shifted - kToInteger;
    const double r = ((angle - turns * kHalfPi1) - turns * kHalfPi2) - turns * kHalfPi3;
    const double r2 = r * r;
    // Taylor series: 7e-12 and 6e-13 from the truth at pi/4.
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

// ---- one head ----

/// kVectors vectors in registers; kVectors = 0: any number of them, in the memory handed over.
template <int kVectors>
struct Row {
  Vec vectors[kVectors];
  explicit Row(float*) {}
  Vec get(int64_t i) const { return vectors[i]; }
  void set(int64_t i, Vec a) { vectors[i] = a; }
};

template <>
struct Row<0> {
  float* memory;
  explicit Row(float* memory) : memory(memory) {}
  Vec get(int64_t i) const { return load(memory + i * Vec::kLanes); }
  void set(int64_t i, Vec a) { store(memory + i * Vec::kLanes, a); }
};

/// T: storage type of q and k. kVectors: vectors of a head, 0 where only known at run time.
template <class T, int kVectors>
class MMRopeKernel {
 public:
  MMRopeKernel(const MMRopeProblem& problem, float* scratch)
      : problem_(problem), head_dim_(problem.head_dim), cos_(scratch), sin_(scratch + problem.head_dim / 2),
        rows_(scratch + problem.head_dim) {}

  void forward(int64_t first_token, int64_t last_token) {
    for (int64_t token = first_token; token < last_token; ++token) {
      turn_to(token);
      for (const MMRopeTensor& tensor : problem_.tensors) {
        for_each_norm_row(tensor, [&](int64_t row, int64_t first_head, int64_t last_head) {
          const Norm norm = norm_row(tensor, row);
          for (int64_t head = first_head; head < last_head; ++head) {
            forward_head(at(tensor.x, token, head), at(tensor.out, token, head), norm);
          }
        });
      }
    }
  }

  void backward(int64_t block, int64_t first_token, int64_t last_token) {
    for (const MMRopeTensor& tensor : problem_.tensors) clear_partials(tensor, block);
    for (int64_t token = first_token; token < last_token; ++token) {
      turn_to(token);
      for (const MMRopeTensor& tensor : problem_.tensors) {
        for_each_norm_row(tensor, [&](int64_t row, int64_t first_head, int64_t last_head) {
          backward_heads(tensor, block, token, row, first_head, last_head);
        });
      }
    }
  }

 private:
  struct Norm {
    const float* weight;  // null without a norm
    const float* bias;
  };

  int64_t vectors() const { return kVectors ? kVectors : head_dim_ / Vec::kLanes; }
  int64_t half() const { return vectors() / 2; }
  float head_dim() const { return static_cast<float>(kVectors ? kVectors * Vec::kLanes : head_dim_); }
  Row<kVectors> row(int64_t index) const { return Row<kVectors>(rows_ + index * head_dim_); }

  static const T* at(const ConstHeads& heads, int64_t token, int64_t head) {
    return static_cast<const T*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
  }
  static T* at(const Heads& heads, int64_t token, int64_t head) {
    return static_cast<T*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
  }

  Norm norm_row(const MMRopeTensor& tensor, int64_t row) const {
    if (!tensor.weight) return {nullptr, nullptr};
    return {tensor.weight + row * head_dim_, tensor.bias + row * head_dim_};
  }

  template <class Body>
  static void for_each_norm_row(const MMRopeTensor& tensor, Body body) {
    const int64_t rows = tensor.weight ? tensor.norm_rows : 1;
    const int64_t heads = tensor.heads / rows;
    for (int64_t row = 0; row < rows; ++row) body(row, row * heads, (row + 1) * heads);
  }

  /// The cosines and sines of a token, for all its heads.
  void turn_to(int64_t token) {
    const int64_t pairs = head_dim_ / 2;
    float by_pair[16];
    for (int pair = 0; pair < 16; ++pair) {
      by_pair[pair] = static_cast<float>(
          problem_.positions[kMMRopeAxes[pair] * problem_.axis_stride + token * problem_.token_stride]);
    }
    // The fp32 product, rounded once: the angle the model was trained with. -ffp-contract=off keeps it one.
    for (int64_t pair = 0; pair < pairs; pair += 16) {
      for (int i = 0; i < 16; ++i) cos_[pair + i] = by_pair[i] * problem_.inv_freq[pair + i];
    }
    cos_sin(cos_, sin_, pairs);
  }

  Vec cos_of(int64_t i) const { return load(cos_ + i * Vec::kLanes); }
  Vec sin_of(int64_t i) const { return load(sin_ + i * Vec::kLanes); }
  static Vec load_vector(const T* from, int64_t i) { return load(from + i * Vec::kLanes); }
  static void store_vector(T* to, int64_t i, Vec a) { store(to + i * Vec::kLanes, a); }

  /// x becomes x_hat; returns rstd. Two passes: one pass would lose the variance of an x with a large mean.
  float normalise(Row<kVectors>& x) const {
    Vec total = x.get(0);
    for (int64_t i = 1; i < vectors(); ++i) total = total + x.get(i);
    const Vec mean = broadcast(sum(total) / head_dim());
    Vec squares = broadcast(0);
    for (int64_t i = 0; i < vectors(); ++i) {
      const Vec centred = x.get(i) - mean;
      squares = fma(centred, centred, squares);
      x.set(i, centred);
    }
    const float rstd = 1.0f / __builtin_sqrtf(sum(squares) / head_dim() + problem_.eps);
    for (int64_t i = 0; i < vectors(); ++i) x.set(i, x.get(i) * broadcast(rstd));
    return rstd;
  }

  void forward_head(const T* from, T* to, Norm norm) const {
    Row<kVectors> y = row(0);
    for (int64_t i = 0; i < vectors(); ++i) y.set(i, load_vector(from, i));
    if (norm.weight) {
      normalise(y);
      for (int64_t i = 0; i < vectors(); ++i) {
        y.set(i, fma(y.get(i), load(norm.weight + i * Vec::kLanes), load(norm.bias + i * Vec::kLanes)));
      }
    }
    for (int64_t i = 0; i < half(); ++i) {
      const Vec first = y.get(i), second = y.get(i + half());
      store_vector(to, i, fms(first, cos_of(i), second * sin_of(i)));
      store_vector(to, i + half(), fma(second, cos_of(i), first * sin_of(i)));
    }
  }

  /// The heads that share a row of the norm. Their gradients of weight and bias add up in fp32, those of the tokens in
  /// double: a block's sum is then as good as its terms.
  void backward_heads(const MMRopeTensor& tensor, int64_t block, int64_t token, int64_t norm, int64_t first_head,
                      int64_t last_head) const {
    Row<kVectors> dweight = row(2), dbias = row(3);
    for (int64_t i = 0; i < vectors(); ++i) {
      dweight.set(i, broadcast(0));
      dbias.set(i, broadcast(0));
    }
    const float* weight = norm_row(tensor, norm).weight;
    for (int64_t head = first_head; head < last_head; ++head) {
      const T* x = at(tensor.x, token, head);
      const T* grad = at(tensor.grad, token, head);
      backward_head(x, grad, at(tensor.out, token, head), weight, dweight, dbias);
    }
    if (!weight) return;
    double* partial = partials(tensor, block) + norm * head_dim_;
    add_to(partial, dweight);
    add_to(partial + tensor.norm_rows * head_dim_, dbias);
  }

  void backward_head(const T* x, const T* grad, T* dx, const float* weight, Row<kVectors>& dweight,
                     Row<kVectors>& dbias) const {
    Row<kVectors> dy = row(0);
    for (int64_t i = 0; i < half(); ++i) {
      const Vec first = load_vector(grad, i), second = load_vector(grad, i + half());
      dy.set(i, fma(first, cos_of(i), second * sin_of(i)));
      dy.set(i + half(), fms(second, cos_of(i), first * sin_of(i)));
    }
    if (!weight) {
      for (int64_t i = 0; i < vectors(); ++i) store_vector(dx, i, dy.get(i));
      return;
    }
    Row<kVectors> x_hat = row(1);
    for (int64_t i = 0; i < vectors(); ++i) x_hat.set(i, load_vector(x, i));
    const float rstd = normalise(x_hat);
    Vec total = broadcast(0), along = broadcast(0);
    for (int64_t i = 0; i < vectors(); ++i) {
      dweight.set(i, fma(dy.get(i), x_hat.get(i), dweight.get(i)));
      dbias.set(i, dbias.get(i) + dy.get(i));
      const Vec g = dy.get(i) * load(weight + i * Vec::kLanes);
      total = total + g;
      along = fma(g, x_hat.get(i), along);
      dy.set(i, g);
    }
    const Vec mean = broadcast(sum(total) / head_dim()), minus_slope = broadcast(-sum(along) / head_dim());
    for (int64_t i = 0; i < vectors(); ++i) {
      store_vector(dx, i, fma(x_hat.get(i), minus_slope, dy.get(i) - mean) * broadcast(rstd));
    }
  }

  double* partials(const MMRopeTensor& tensor, int64_t block) const {
    return tensor.partials + block * 2 * tensor.norm_rows * head_dim_;
  }

  void clear_partials(const MMRopeTensor& tensor, int64_t block) const {
    if (!tensor.weight) return;
    double* sums = partials(tensor, block);
    for (int64_t i = 0; i < 2 * tensor.norm_rows * head_dim_; ++i) sums[i] = 0;
  }

  void add_to(double* sums, const Row<kVectors>& row) const {
    for (int64_t i = 0; i < vectors(); ++i) {
      float lanes[Vec::kLanes];
      store(lanes, row.get(i));
      for (int lane = 0; lane < Vec::kLanes; ++lane) sums[i * Vec::kLanes + lane] += lanes[lane];
    }
  }

  const MMRopeProblem& problem_;
  const int64_t head_dim_;
  float* const cos_;   // [D/2]
  float* const sin_;   // [D/2]
  float* const rows_;  // [4, D], for the heads that do not fit registers
};

// ---- choosing the instantiation ----

/// Calls `run` with the kernel for the storage type T and the head size.
template <class T, class Run>
void with_head_dim(const MMRopeProblem& problem, float* scratch, Run run) {
  switch (problem.head_dim) {
    case 32:
      return run(MMRopeKernel<T, 32 / Vec::kLanes>(problem, scratch));
    case 64:
      return run(MMRopeKernel<T, 64 / Vec::kLanes>(problem, scratch));
    case 96:
      return run(MMRopeKernel<T, 96 / Vec::kLanes>(problem, scratch));
    case 128:
      return run(MMRopeKernel<T, 128 / Vec::kLanes>(problem, scratch));
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
