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
  return {score.mutable_data_ptr<float>(), ids.mutable_data_ptr<int64_t>(), logit.mutable_data_ptr<float>(),
          maximum.mutable_data_ptr<float>(), sum.mutable_data_ptr<double>()};
}

/// Applies guidance and temperature to a block of logits, in place, and updates the state with the block. The block
/// with first = 0 initialises the state. logits is fp32 [R, classes], or with guidance [2 R, classes]: the conditional
/// rows, then the unconditional ones. keys is int64 [R, 2]. Both are contiguous.
void masked_sample_reduce(Tensor logits, std::optional<Tensor> keys, bool guided, double guidance_scale,
                          double temperature, int64_t first, Tensor score, Tensor ids, Tensor logit, Tensor maximum,
                          Tensor sum, int64_t isa) {
  const int64_t rows = score.size(0);
  MaskedSampleBlock block{};
  block.classes = logits.size(1);
  block.first = first;
  block.logits = logits.mutable_data_ptr<float>();
  block.uncond = guided ? block.logits + rows * block.classes : nullptr;
  block.guidance_scale = static_cast<float>(guidance_scale);
  block.temperature = static_cast<float>(temperature);
  block.keys = keys ? keys->const_data_ptr<int64_t>() : nullptr;
  const MaskedSampleState state = masked_sample_state(score, ids, logit, maximum, sum);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    masked_sample_kernels(isa).reduce(block, state, begin, end);
  });
}

/// Writes the confidence of the ids that the state holds. confidence is fp32 [R].
void masked_sample_finish(Tensor score, Tensor ids, Tensor logit, Tensor maximum, Tensor sum, Tensor confidence,
                          int64_t isa) {
  const MaskedSampleState state = masked_sample_state(score, ids, logit, maximum, sum);
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
