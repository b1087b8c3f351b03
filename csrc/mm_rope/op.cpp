// Registers mm_rope under torch's stable ABI. Forward splits the tokens among the threads, and backward splits blocks
// of kMMRopeBlock tokens.
#include <algorithm>
#include <optional>
#include <tuple>

#include "mm_rope/problem.h"
#include "stable_abi/huge_pages.h"
#include "stable_abi/tensors.h"

namespace lumos {
namespace {

const MMRopeKernels& mm_rope_kernels(int64_t isa) {
  return kernels_for(isa, kMMRopeAvx512, kMMRopeAvx2, kMMRopeBase);
}

/// Raises an error unless q or k, and its norm, are what the kernels walk over.
void check_side(const Tensor& x, const Tensor& q, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 3 && q.dim() == 3, "q and k must be [T, H, D]");
  const int64_t heads = x.size(1), head_dim = q.size(2);
  STD_TORCH_CHECK(head_dim % 32 == 0, "the head size must be a multiple of 32; got ", head_dim);
  check_tensor("q or k", x, {q.size(0), heads, head_dim}, q.scalar_type(), Strides::unit_last);
  STD_TORCH_CHECK(weight.has_value() == bias.has_value(), "a norm has both weight and bias");
  if (!weight) return;
  const int64_t rows = weight->dim() ? weight->size(0) : 0;
  STD_TORCH_CHECK(rows > 0 && heads % rows == 0, "the rows of a norm must divide its heads; got ", rows, " and ",
                  heads);
  check_tensor("norm weight", *weight, {rows, head_dim}, ScalarType::Float);
  check_tensor("norm bias", *bias, {rows, head_dim}, ScalarType::Float);
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& positions, const std::optional<Tensor>& q_weight,
                  const std::optional<Tensor>& q_bias, const std::optional<Tensor>& k_weight,
                  const std::optional<Tensor>& k_bias, const Tensor& inv_freq) {
  check_side(q, q, q_weight, q_bias);
  check_side(k, q, k_weight, k_bias);
  check_tensor("positions", positions, {3, q.size(0)}, ScalarType::Int, Strides::any);
  check_tensor("inv_freq", inv_freq, {q.size(2) / 2}, ScalarType::Float);
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

/// Returns the rotated q and k. q and k have a unit last stride. Weights and biases are fp32 and contiguous. inv_freq
/// is fp32 [D/2] and contiguous.
std::tuple<Tensor, Tensor> mm_rope_forward(Tensor q, Tensor k, Tensor positions, std::optional<Tensor> q_weight,
                                           std::optional<Tensor> q_bias, std::optional<Tensor> k_weight,
                                           std::optional<Tensor> k_bias, Tensor inv_freq, double eps, int64_t isa) {
  check_inputs(q, k, positions, q_weight, q_bias, k_weight, k_bias, inv_freq);
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

/// Returns the gradients of weight and bias, fp32 [rows, D]. The partial sums [blocks, 2, rows, D] are added in the
/// order of the blocks, in double.
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

/// Adds the upstream gradient to the description. Returns the workspace of the norm's gradients, [blocks, 2, rows, D],
/// which is empty without a norm.
Tensor add_backward(MMRopeTensor& tensor, const Tensor& grad, int64_t blocks, int64_t head_dim) {
  tensor.grad = read_heads(grad);
  Tensor partials = empty_on_cpu({blocks, 2, tensor.norm_rows, head_dim}, ScalarType::Double);
  tensor.partials = partials.mutable_data_ptr<double>();
  return partials;
}

/// Returns the gradients of q and k, then those of the norms, which are fp32, and [0, D] without a norm. grad_q and
/// grad_k have a unit last stride. The other inputs are those of forward.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mm_rope_backward(
    Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor positions, std::optional<Tensor> q_weight,
    std::optional<Tensor> q_bias, std::optional<Tensor> k_weight, std::optional<Tensor> k_bias, Tensor inv_freq,
    double eps, int64_t isa) {
  check_inputs(q, k, positions, q_weight, q_bias, k_weight, k_bias, inv_freq);
  check_tensor("grad_q", grad_q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type(), Strides::unit_last);
  check_tensor("grad_k", grad_k, {q.size(0), k.size(1), q.size(2)}, q.scalar_type(), Strides::unit_last);
  const int64_t tokens = q.size(0), blocks = ceil_div(tokens, kMMRopeBlock);
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

STABLE_TORCH_LIBRARY_FRAGMENT(lumos_native, m) {
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
