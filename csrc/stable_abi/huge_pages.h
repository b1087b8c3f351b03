// Backs large results with huge pages.
//
// glibc maps every block of 32 MiB and more anew, and unmaps it when it is freed. Each call of an op therefore has the
// system hand out and clear the pages of its outputs again, which took most of the time of mm_rope. Huge pages are
// 512 times as large, so that there are a 512th as many.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace lumos {

/// Asks the system to back a tensor with huge pages. The tensor is contiguous and not yet written. The request covers
/// the huge pages that lie entirely in the tensor, so none of the memory around it is affected. A system without huge
/// pages ignores the request.
inline void advise_huge_pages(const torch::stable::Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t bytes = static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

/// Returns an unwritten, contiguous tensor on the CPU, in huge pages if it is large enough.
inline torch::stable::Tensor empty_on_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                          torch::headeronly::ScalarType dtype) {
  torch::stable::Tensor tensor = torch::stable::empty(sizes, dtype);
  advise_huge_pages(tensor);
  return tensor;
}

}  // namespace lumos
