// Registers frame_layout under torch's stable ABI.
#include <algorithm>
#include <tuple>
#include <vector>

#include "frame_layout/problem.h"
#include "stable_abi/tensors.h"

namespace lumos {
namespace {

/// Returns document bounds that rise from 0 to `tokens`, whatever the caller gave: values below an earlier one become
/// that one, values outside become the nearest bound, the first becomes 0 and the last becomes `tokens`.
std::vector<int32_t> rising(const int32_t* bounds, int64_t count, int64_t tokens) {
  std::vector<int32_t> result(count);
  int64_t latest = 0;
  for (int64_t b = 0; b < count; ++b) {
    latest = std::max(latest, std::min<int64_t>(bounds[b], tokens));
    result[b] = static_cast<int32_t>(latest);
  }
  if (count) result.front() = 0, result.back() = static_cast<int32_t>(tokens);
  return result;
}

/// Returns positions, content, frame_index, kv_start, kv_end, q_start and q_end. ids is int32 or int64 [T], and
/// cu_seqlens is int32 [B + 1]. Both are contiguous.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> frame_layout(Tensor ids, Tensor cu_seqlens) {
  check_tensor("ids", ids, {ids.numel()}, ids.scalar_type());
  check_tensor("cu_seqlens", cu_seqlens, {cu_seqlens.numel()}, ScalarType::Int);
  const int64_t tokens = ids.size(0), documents = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(tokens == 0 || documents > 0, "cu_seqlens holds no document for ", tokens, " tokens");
  const auto numbers = [&] { return torch::stable::empty({tokens}, ScalarType::Int); };
  Tensor positions = torch::stable::empty({3, tokens}, ScalarType::Int);
  Tensor content = torch::stable::empty({tokens}, ScalarType::Bool);
  Tensor frame_index = numbers(), kv_start = numbers(), kv_end = numbers(), q_start = numbers(), q_end = numbers();
  const auto data = [](Tensor& tensor) { return tensor.mutable_data_ptr<int32_t>(); };
  const FrameLayoutOut out{data(positions), content.mutable_data_ptr<bool>(), data(frame_index),
                           data(kv_start),  data(kv_end),                     data(q_start),
                           data(q_end)};
  const std::vector<int32_t> safe = rising(cu_seqlens.const_data_ptr<int32_t>(), documents + 1, tokens);
  const int32_t* bounds = safe.data();
  if (ids.scalar_type() == ScalarType::Long) {
    read_frame_layout(ids.const_data_ptr<int64_t>(), tokens, bounds, documents, out);
  } else {
    read_frame_layout(ids.const_data_ptr<int32_t>(), tokens, bounds, documents, out);
  }
  return {positions, content, frame_index, kv_start, kv_end, q_start, q_end};
}

}  // namespace
}  // namespace lumos

STABLE_TORCH_LIBRARY_FRAGMENT(lumos_native, m) {
  m.def("frame_layout(Tensor ids, Tensor cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lumos_native, CPU, m) { m.impl("frame_layout", TORCH_BOX(&lumos::frame_layout)); }
