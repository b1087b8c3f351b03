// Registers the row passes of masked_sample under torch's stable ABI. matmul/op.cpp registers the matmuls.
#include <optional>

#include "masked_sample/problem.h"
#include "stable_abi/tensors.h"

namespace lumos {
namespace {

const MaskedSampleKernels& masked_sample_kernels(int64_t isa) {
  return kernels_for(isa, kMaskedSampleAvx512, kMaskedSampleAvx2, kMaskedSampleBase);
}

/// score, logit and maximum are fp32, ids is int64, and sum is fp64. All are [R] and contiguous.
MaskedSampleState masked_sample_state(const Tensor& score, const Tensor& ids, const Tensor& logit,
                                      const Tensor& maximum, const Tensor& sum) {
  const int64_t rows = score.numel();
  check_tensor("score", score, {rows}, ScalarType::Float);
  check_tensor("ids", ids, {rows}, ScalarType::Long);
  check_tensor("logit", logit, {rows}, ScalarType::Float);
  check_tensor("maximum", maximum, {rows}, ScalarType::Float);
  check_tensor("sum", sum, {rows}, ScalarType::Double);
  return {score.mutable_data_ptr<float>(), ids.mutable_data_ptr<int64_t>(), logit.mutable_data_ptr<float>(),
          maximum.mutable_data_ptr<float>(), sum.mutable_data_ptr<double>()};
}

/// Applies guidance and temperature to a block of logits, in place, and updates the state with the block. The block
/// with first = 0 initialises the state. logits is fp32 [R, classes], or with guidance [2 R, classes]: the conditional
/// rows, then the unconditional ones. keys is int64 [R, 2]. Both are contiguous.
void masked_sample_reduce(Tensor logits, std::optional<Tensor> keys, bool guided, double guidance_scale,
                          double temperature, int64_t first, Tensor score, Tensor ids, Tensor logit, Tensor maximum,
                          Tensor sum, int64_t isa) {
  const MaskedSampleState state = masked_sample_state(score, ids, logit, maximum, sum);
  const int64_t rows = score.size(0);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && first >= 0,
                  "logits must be [rows, classes] with a class at least, and first >= 0");
  check_tensor("logits", logits, {guided ? 2 * rows : rows, logits.size(1)}, ScalarType::Float);
  if (keys) check_tensor("keys", *keys, {rows, 2}, ScalarType::Long);
  MaskedSampleBlock block{};
  block.classes = logits.size(1);
  block.first = first;
  block.logits = logits.mutable_data_ptr<float>();
  block.uncond = guided ? block.logits + rows * block.classes : nullptr;
  block.guidance_scale = static_cast<float>(guidance_scale);
  block.temperature = static_cast<float>(temperature);
  block.keys = keys ? keys->const_data_ptr<int64_t>() : nullptr;
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    masked_sample_kernels(isa).reduce(block, state, begin, end);
  });
}

/// Writes the confidence of the ids that the state holds. confidence is fp32 [R].
void masked_sample_finish(Tensor score, Tensor ids, Tensor logit, Tensor maximum, Tensor sum, Tensor confidence,
                          int64_t isa) {
  const MaskedSampleState state = masked_sample_state(score, ids, logit, maximum, sum);
  check_tensor("confidence", confidence, {score.size(0)}, ScalarType::Float);
  masked_sample_kernels(isa).finish(state, confidence.mutable_data_ptr<float>(), 0, score.size(0));
}

}  // namespace
}  // namespace lumos

STABLE_TORCH_LIBRARY_FRAGMENT(lumos_native, m) {
  m.def(
      "masked_sample_reduce(Tensor(a!) logits, Tensor? keys, bool guided, float guidance_scale, float temperature, "
      "int first, Tensor(b!) score, Tensor(c!) ids, Tensor(d!) logit, Tensor(e!) maximum, Tensor(f!) sum, int isa) "
      "-> ()");
  m.def(
      "masked_sample_finish(Tensor score, Tensor ids, Tensor logit, Tensor maximum, Tensor sum, "
      "Tensor(a!) confidence, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lumos_native, CPU, m) {
  m.impl("masked_sample_reduce", TORCH_BOX(&lumos::masked_sample_reduce));
  m.impl("masked_sample_finish", TORCH_BOX(&lumos::masked_sample_finish));
}
