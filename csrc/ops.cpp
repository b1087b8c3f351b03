// The CPU ops under torch's stable ABI: one library for every torch from TORCH_TARGET_VERSION on and every Python.
//
// Tensors become the plain structs of csrc/include/lumos here, and threads are handed out here; kernels know neither.
// Callers (lumos_kernels/*/native.py) have validated shapes, dtypes and devices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>

#include "lumos/isa.h"
#include "lumos/mm_rope.h"

namespace lumos {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::fp16;
    case ScalarType::Float:
      return Dtype::fp32;
    default:
      STD_TORCH_CHECK(false, "the compiled library computes bfloat16, float16 and float32");
  }
}

ConstHeads read_heads(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }

Heads write_heads(const Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1)}; }

Tensor empty_on_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype);
}

/// Floats for one thread, aligned to a cache line. std::aligned_alloc wants a multiple of the alignment.
struct Scratch {
  explicit Scratch(int64_t floats)
      : data(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)), std::free) {
    STD_TORCH_CHECK(data, "out of memory for a scratch buffer of ", floats, " floats");
  }
  std::unique_ptr<float, decltype(&std::free)> data;
};

// ---- mm_rope ----

const MMRopeKernels& mm_rope_kernels(int64_t isa) {
  switch (static_cast<Isa>(isa)) {
    case Isa::avx512:
      return kMMRopeAvx512;
    case Isa::avx2:
      return kMMRopeAvx2;
    case Isa::base:
      return kMMRopeBase;
  }
  STD_TORCH_CHECK(false, "no instruction set ", isa);
}

MMRopeProblem mm_rope_problem(const Tensor& q, const Tensor& positions, const Tensor& inv_freq, double eps) {
  MMRopeProblem problem{};
  problem.dtype = dtype_of(q);
  problem.head_dim = q.size(2);
  problem.positions = positions.const_data_ptr<int32_t>();
  problem.axis_stride = positions.stride(0);
  problem.token_stride = positions.stride(1);
  problem.inv_freq = inv_freq.const_data_ptr<float>();
  problem.eps = static_cast<float>(eps);
  return problem;
}

MMRopeTensor mm_rope_tensor(const Tensor& x, const Tensor& out, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& bias) {
  MMRopeTensor tensor{};
  tensor.heads = x.size(1);
  tensor.x = read_heads(x);
  tensor.out = write_heads(out);
  if (weight) {
    tensor.weight = weight->const_data_ptr<float>();
    tensor.bias = bias->const_data_ptr<float>();
    tensor.norm_rows = weight->size(0);
  }
  return tensor;
}

/// Norms fp32 and contiguous, inv_freq fp32 [D/2] contiguous; q and k have a unit last stride.
std::tuple<Tensor, Tensor> mm_rope_forward(Tensor q, Tensor k, Tensor positions, std::optional<Tensor> q_weight,
                                           std::optional<Tensor> q_bias, std::optional<Tensor> k_weight,
                                           std::optional<Tensor> k_bias, Tensor inv_freq, double eps, int64_t isa) {
  const int64_t tokens = q.size(0);
  Tensor q_out = empty_on_cpu(q.sizes(), q.scalar_type());
  Tensor k_out = empty_on_cpu(k.sizes(), k.scalar_type());
  MMRopeProblem problem = mm_rope_problem(q, positions, inv_freq, eps);
  problem.tensors[0] = mm_rope_tensor(q, q_out, q_weight, q_bias);
  problem.tensors[1] = mm_rope_tensor(k, k_out, k_weight, k_bias);
  const MMRopeKernels& kernels = mm_rope_kernels(isa);
  torch::stable::parallel_for(0, tokens, kMMRopeBlock, [&](int64_t first, int64_t last) {
    const Scratch scratch(kMMRopeScratch * problem.head_dim);
    kernels.forward(problem, first, last, scratch.data.get());
  });
  return {q_out, k_out};
}

/// The gradients of weight and bias: the blocks' partial sums [blocks, 2, rows, D] added in order, in double.
std::tuple<Tensor, Tensor> add_partials(const Tensor& partials) {
  const int64_t blocks = partials.size(0), rows = partials.size(2), head_dim = partials.size(3);
  Tensor total = torch::stable::new_zeros(partials, {2 * rows * head_dim});
  double* sums = total.mutable_data_ptr<double>();
  const double* terms = partials.const_data_ptr<double>();
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < 2 * rows * head_dim; ++i) sums[i] += *terms++;
  }
  Tensor dweight = empty_on_cpu({rows, head_dim}, ScalarType::Float);
  Tensor dbias = empty_on_cpu({rows, head_dim}, ScalarType::Float);
  std::copy(sums, sums + rows * head_dim, dweight.mutable_data_ptr<float>());
  std::copy(sums + rows * head_dim, sums + 2 * rows * head_dim, dbias.mutable_data_ptr<float>());
  return {dweight, dbias};
}

/// Adds the upstream gradient and the workspace of the norm's gradients [blocks, 2, rows, D], empty without a norm.
Tensor add_backward(MMRopeTensor& tensor, const Tensor& grad, int64_t blocks, int64_t head_dim) {
  tensor.grad = read_heads(grad);
  Tensor partials = empty_on_cpu({blocks, 2, tensor.norm_rows, head_dim}, ScalarType::Double);
  tensor.partials = partials.mutable_data_ptr<double>();
  return partials;
}

/// As forward; grad_q and grad_k have a unit last stride. Gradients of the norms are fp32, [0, D] without a norm.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mm_rope_backward(
    Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor positions, std::optional<Tensor> q_weight,
    std::optional<Tensor> q_bias, std::optional<Tensor> k_weight, std::optional<Tensor> k_bias, Tensor inv_freq,
    double eps, int64_t isa) {
  const int64_t tokens = q.size(0), blocks = (tokens + kMMRopeBlock - 1) / kMMRopeBlock;
  Tensor dq = empty_on_cpu(q.sizes(), q.scalar_type());
  Tensor dk = empty_on_cpu(k.sizes(), k.scalar_type());
  MMRopeProblem problem = mm_rope_problem(q, positions, inv_freq, eps);
  problem.tensors[0] = mm_rope_tensor(q, dq, q_weight, q_bias);
  problem.tensors[1] = mm_rope_tensor(k, dk, k_weight, k_bias);
  const Tensor q_partials = add_backward(problem.tensors[0], grad_q, blocks, problem.head_dim);
  const Tensor k_partials = add_backward(problem.tensors[1], grad_k, blocks, problem.head_dim);
  const MMRopeKernels& kernels = mm_rope_kernels(isa);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    const Scratch scratch(kMMRopeScratch * problem.head_dim);
    for (int64_t block = first; block < last; ++block) {
      const int64_t end = std::min(tokens, (block + 1) * kMMRopeBlock);
      kernels.backward(problem, block, block * kMMRopeBlock, end, scratch.data.get());
    }
  });
  auto [dq_weight, dq_bias] = add_partials(q_partials);
  auto [dk_weight, dk_bias] = add_partials(k_partials);
  return {dq, dk, dq_weight, dq_bias, dk_weight, dk_bias};
}

}  // namespace
}  // namespace lumos

// The instruction set is an int: torch's stable ABI leaks a std::string for every string argument (seen in 2.13).
STABLE_TORCH_LIBRARY(lumos_native, m) {
  m.def(
      "mm_rope_forward(Tensor q, Tensor k, Tensor positions, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, "
      "Tensor? k_bias, Tensor inv_freq, float eps, int isa) -> (Tensor, Tensor)");
  m.def(
      "mm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor positions, Tensor? q_weight, "
      "Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, Tensor inv_freq, float eps, int isa) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lumos_native, CPU, m) {
  m.impl("mm_rope_forward", TORCH_BOX(&lumos::mm_rope_forward));
  m.impl("mm_rope_backward", TORCH_BOX(&lumos::mm_rope_backward));
}
