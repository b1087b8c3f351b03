// The ops of masked_sample under torch's stable ABI, as ops.cpp has those of the others. Callers
// (lumos_kernels/masked_sample/native.py) have validated shapes, dtypes and devices.
#include <optional>

#include "lumos/masked_sample.h"
#include "op_common.h"

namespace lumos {
namespace {

const MaskedSampleKernels& masked_sample_kernels(int64_t isa) {
  return kernels_for(isa, kMaskedSampleAvx512, kMaskedSampleAvx2, kMaskedSampleBase);
}

/// x fp32 [R, C] with a unit last stride, as the left factor of the logits.
Tensor masked_sample_pack_rows(Tensor x, int64_t isa) {
  const int64_t rows = x.size(0), columns = x.size(1), tiles = ceil_div(rows, kMaskedSampleTileRows);
  Tensor packed = torch::stable::empty({tiles * kMaskedSampleTileRows * columns}, ScalarType::Float);
  const float* from = x.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      masked_sample_kernels(isa).pack_tile(from, rows, columns, x.stride(0), tile, to);
    }
  });
  return packed;
}

/// out fp32 [R, classes] = x weight^T, contiguous; weight with a unit last stride, packed from masked_sample_pack_rows.
void masked_sample_logits(Tensor packed, Tensor weight, Tensor out, int64_t isa) {
  const MaskedSampleKernels& kernels = masked_sample_kernels(isa);
  const MaskedSampleWeight right{dtype_of(weight), weight.const_data_ptr(), weight.size(0), weight.size(1),
                                 weight.stride(0)};
  const float* left = packed.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, ceil_div(right.rows, kernels.panel), 1, [&](int64_t first, int64_t last) {
    kernels.logits(left, out.size(0), right, to, first, last);
  });
}

MaskedSampleState masked_sample_state(const Tensor& score, const Tensor& ids, const Tensor& logit,
                                      const Tensor& maximum, const Tensor& sum) {
  return {score.mutable_data_ptr<float>(), ids.mutable_data_ptr<int64_t>(), logit.mutable_data_ptr<float>(),
          maximum.mutable_data_ptr<float>(), sum.mutable_data_ptr<double>()};
}

/// logits fp32 [R, classes], or [2 R, classes] with guidance: the conditional rows, then the others. keys int64 [R, 2].
/// The state: score, logit, maximum fp32, ids int64, sum fp64, all [R]; written at first = 0. All contiguous.
void masked_sample_reduce(Tensor logits, std::optional<Tensor> keys, bool guided, double guidance, double temperature,
                          int64_t first, Tensor score, Tensor ids, Tensor logit, Tensor maximum, Tensor sum,
                          int64_t isa) {
  const int64_t rows = score.size(0);
  MaskedSampleBlock block{};
  block.classes = logits.size(1);
  block.first = first;
  block.logits = logits.mutable_data_ptr<float>();
  block.uncond = guided ? block.logits + rows * block.classes : nullptr;
  block.guidance = static_cast<float>(guidance);
  block.temperature = static_cast<float>(temperature);
  block.keys = keys ? keys->const_data_ptr<int64_t>() : nullptr;
  const MaskedSampleState state = masked_sample_state(score, ids, logit, maximum, sum);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    masked_sample_kernels(isa).reduce(block, state, begin, end);
  });
}

/// confidence fp32 [R].
void masked_sample_finish(Tensor score, Tensor ids, Tensor logit, Tensor maximum, Tensor sum, Tensor confidence,
                          int64_t isa) {
  const MaskedSampleState state = masked_sample_state(score, ids, logit, maximum, sum);
  masked_sample_kernels(isa).finish(state, confidence.mutable_data_ptr<float>(), 0, score.size(0));
}

}  // namespace
}  // namespace lumos

STABLE_TORCH_LIBRARY_FRAGMENT(lumos_native, m) {
  m.def("masked_sample_pack_rows(Tensor x, int isa) -> Tensor");
  m.def("masked_sample_logits(Tensor packed, Tensor weight, Tensor(a!) out, int isa) -> ()");
  m.def(
      "masked_sample_reduce(Tensor(a!) logits, Tensor? keys, bool guided, float guidance, float temperature, "
      "int first, Tensor(b!) score, Tensor(c!) ids, Tensor(d!) logit, Tensor(e!) maximum, Tensor(f!) sum, int isa) "
      "-> ()");
  m.def(
      "masked_sample_finish(Tensor score, Tensor ids, Tensor logit, Tensor maximum, Tensor sum, "
      "Tensor(a!) confidence, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lumos_native, CPU, m) {
  m.impl("masked_sample_pack_rows", TORCH_BOX(&lumos::masked_sample_pack_rows));
  m.impl("masked_sample_logits", TORCH_BOX(&lumos::masked_sample_logits));
  m.impl("masked_sample_reduce", TORCH_BOX(&lumos::masked_sample_reduce));
  m.impl("masked_sample_finish", TORCH_BOX(&lumos::masked_sample_finish));
}
