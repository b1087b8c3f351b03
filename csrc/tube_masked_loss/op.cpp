// Registers the row passes of tube_masked_loss under torch's stable ABI. matmul/op.cpp registers the matmuls.
#include <optional>
#include <tuple>

#include "stable_abi/huge_pages.h"
#include "stable_abi/tensors.h"
#include "tube_masked_loss/problem.h"

namespace lumos {
namespace {

const TubeMaskedLossKernels& tube_masked_loss_kernels(int64_t isa) {
  return kernels_for(isa, kTubeMaskedLossAvx512, kTubeMaskedLossAvx2, kTubeMaskedLossBase);
}

constexpr int64_t kMostClasses = INT64_MAX / 2;  // sums of two such numbers do not overflow

void check_dlogits(const Tensor& dlogits, int64_t rows, int64_t classes) {
  STD_TORCH_CHECK(dtype_of(dlogits) != Dtype::fp16, "dlogits must be bf16 or fp32");
  check_tensor("dlogits", dlogits, {rows, classes}, dlogits.scalar_type(), Strides::unit_last);
}

/// logits is fp32 [R, classes] and contiguous. targets is int64 [R]. dlogits is [R, K], bf16 or fp32, with a unit last
/// stride.
TubeMaskedLossBlock tube_masked_loss_block(const Tensor& logits, const Tensor& targets, int64_t first,
                                           const std::optional<Tensor>& dlogits) {
  TubeMaskedLossBlock block{};
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [R, classes]; got ", logits.dim(), " dimensions");
  check_tensor("logits", logits, {logits.size(0), logits.size(1)}, ScalarType::Float);
  check_tensor("targets", targets, {logits.size(0)}, ScalarType::Long);
  STD_TORCH_CHECK(first >= 0 && first <= kMostClasses, "tube_masked_loss: no class ", first);
  block.classes = logits.size(1);
  block.first = first;
  block.logits = logits.const_data_ptr<float>();
  block.targets = targets.const_data_ptr<int64_t>();
  if (dlogits) {
    check_dlogits(*dlogits, logits.size(0), dlogits->size(1));
    STD_TORCH_CHECK(first + block.classes <= dlogits->size(1), "tube_masked_loss: dlogits must hold classes ", first,
                    " to ", first + block.classes - 1, "; got ", dlogits->size(1), " columns");
    block.slice_classes = dlogits->size(1);
    block.dtype = dtype_of(*dlogits);
    block.dlogits = dlogits->mutable_data_ptr();
    block.dlogits_stride = dlogits->stride(0);
  }
  return block;
}

/// maximum and sum are fp32 [R, blocks], target_logit is fp32 [R], and beaten is bool [R]. All are contiguous.
TubeMaskedLossStats tube_masked_loss_stats(const Tensor& maximum, const Tensor& sum, const Tensor& target_logit,
                                           const Tensor& beaten) {
  return {maximum.mutable_data_ptr<float>(), sum.mutable_data_ptr<float>(), target_logit.mutable_data_ptr<float>(),
          beaten.mutable_data_ptr<bool>()};
}

void check_stats(int64_t rows, const Tensor& maximum, const Tensor& sum, const Tensor& target_logit,
                 const Tensor& beaten) {
  check_tensor("maximum", maximum, {rows, maximum.size(1)}, ScalarType::Float);
  check_tensor("sum", sum, {rows, maximum.size(1)}, ScalarType::Float);
  check_tensor("target_logit", target_logit, {rows}, ScalarType::Float);
  check_tensor("beaten", beaten, {rows}, ScalarType::Bool);
}

/// Computes the statistics of a block of logits, and writes its exponentials to dlogits if that is given.
void tube_masked_loss_reduce(Tensor logits, Tensor targets, int64_t first, int64_t block_index, Tensor maximum,
                             Tensor sum, Tensor target_logit, Tensor beaten, std::optional<Tensor> dlogits,
                             int64_t isa) {
  TubeMaskedLossBlock block = tube_masked_loss_block(logits, targets, first, dlogits);
  block.block = block_index;
  STD_TORCH_CHECK(maximum.dim() == 2, "maximum must be [R, blocks]");
  block.blocks = maximum.size(1);
  STD_TORCH_CHECK(block_index >= 0 && block_index < block.blocks, "tube_masked_loss: no block ", block_index, " of ",
                  block.blocks);
  check_stats(logits.size(0), maximum, sum, target_logit, beaten);
  const TubeMaskedLossStats stats = tube_masked_loss_stats(maximum, sum, target_logit, beaten);
  torch::stable::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    tube_masked_loss_kernels(isa).reduce(block, stats, begin, end);
  });
}

/// Returns nll, lse and correct, all [R]. Turns the exponentials in dlogits into the gradients of the logits. classes
/// counts the classes of all blocks, and block_classes those of a block but the last. token_weight is fp32 [R].
std::tuple<Tensor, Tensor, Tensor> tube_masked_loss_finish(Tensor targets, std::optional<Tensor> token_weight,
                                                           double z_loss_weight, int64_t classes, int64_t block_classes,
                                                           Tensor maximum, Tensor sum, Tensor target_logit,
                                                           Tensor beaten, std::optional<Tensor> dlogits, int64_t isa) {
  STD_TORCH_CHECK(maximum.dim() == 2, "maximum must be [R, blocks]");
  const int64_t rows = targets.numel();
  check_tensor("targets", targets, {rows}, ScalarType::Long);
  check_stats(rows, maximum, sum, target_logit, beaten);
  if (token_weight) check_tensor("token_weight", *token_weight, {rows}, ScalarType::Float);
  STD_TORCH_CHECK(classes > 0 && classes <= kMostClasses && block_classes > 0 && block_classes <= kMostClasses &&
                      ceil_div(classes, block_classes) == maximum.size(1),
                  "tube_masked_loss: ", classes, " classes in blocks of ", block_classes, " are not ", maximum.size(1),
                  " blocks");
  if (dlogits) check_dlogits(*dlogits, rows, classes);
  Tensor nll = empty_on_cpu({rows}, ScalarType::Float);
  Tensor lse = empty_on_cpu({rows}, ScalarType::Float);
  Tensor correct = empty_on_cpu({rows}, ScalarType::Bool);
  TubeMaskedLossFinish job{};
  job.classes = classes;
  job.block_classes = block_classes;
  job.blocks = maximum.size(1);
  job.targets = targets.const_data_ptr<int64_t>();
  job.token_weight = token_weight ? token_weight->const_data_ptr<float>() : nullptr;
  job.z_loss_weight = static_cast<float>(z_loss_weight);
  if (dlogits) {
    job.dtype = dtype_of(*dlogits);
    job.dlogits = dlogits->mutable_data_ptr();
    job.dlogits_stride = dlogits->stride(0);
  }
  job.nll = nll.mutable_data_ptr<float>();
  job.lse = lse.mutable_data_ptr<float>();
  job.correct = correct.mutable_data_ptr<bool>();
  const TubeMaskedLossStats stats = tube_masked_loss_stats(maximum, sum, target_logit, beaten);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    tube_masked_loss_kernels(isa).finish(job, stats, begin, end);
  });
  return {nll, lse, correct};
}

/// Writes the gradients of a block's logits to dlogits. lse, dnll and dlse are fp32 [R] and contiguous.
void tube_masked_loss_gradient(Tensor logits, Tensor targets, int64_t first, Tensor lse, Tensor dnll, Tensor dlse,
                               Tensor dlogits, int64_t isa) {
  const TubeMaskedLossBlock block = tube_masked_loss_block(logits, targets, first, dlogits);
  check_tensor("lse", lse, {logits.size(0)}, ScalarType::Float);
  check_tensor("dnll", dnll, {logits.size(0)}, ScalarType::Float);
  check_tensor("dlse", dlse, {logits.size(0)}, ScalarType::Float);
  const TubeMaskedLossGradient upstream{lse.const_data_ptr<float>(), dnll.const_data_ptr<float>(),
                                        dlse.const_data_ptr<float>()};
  torch::stable::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    tube_masked_loss_kernels(isa).gradient(block, upstream, begin, end);
  });
}

}  // namespace
}  // namespace lumos

STABLE_TORCH_LIBRARY_FRAGMENT(lumos_native, m) {
  m.def(
      "tube_masked_loss_reduce(Tensor logits, Tensor targets, int first, int block, Tensor(a!) maximum, "
      "Tensor(b!) sum, Tensor(c!) target_logit, Tensor(d!) beaten, Tensor(e!)? dlogits, int isa) -> ()");
  m.def(
      "tube_masked_loss_finish(Tensor targets, Tensor? token_weight, float z_loss_weight, int classes, "
      "int block_classes, Tensor maximum, Tensor sum, Tensor target_logit, Tensor beaten, Tensor(a!)? dlogits, "
      "int isa) -> (Tensor, Tensor, Tensor)");
  m.def(
      "tube_masked_loss_gradient(Tensor logits, Tensor targets, int first, Tensor lse, Tensor dnll, Tensor dlse, "
      "Tensor(a!) dlogits, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lumos_native, CPU, m) {
  m.impl("tube_masked_loss_reduce", TORCH_BOX(&lumos::tube_masked_loss_reduce));
  m.impl("tube_masked_loss_finish", TORCH_BOX(&lumos::tube_masked_loss_finish));
  m.impl("tube_masked_loss_gradient", TORCH_BOX(&lumos::tube_masked_loss_gradient));
}
