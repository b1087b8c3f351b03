// frame_layout on the CPU describes a packed stream of text and frames, which it reads from the token ids. See
// FrameLayout in lumos_kernels/layout.py.
#pragma once

#include <cstdint>

namespace lumos {

/// The results to write. positions is [3, tokens], and every other array is [tokens].
struct FrameLayoutOut {
  int32_t* positions;
  bool* content;
  int32_t* frame_index;
  int32_t* kv_start;
  int32_t* kv_end;
  int32_t* q_start;
  int32_t* q_end;
};

/// Reads the layout of the ids. Document b consists of the tokens cu_seqlens[b] <= i < cu_seqlens[b + 1]. If there are
/// tokens, there is at least one document. cu_seqlens rises from 0 to `tokens`.
void read_frame_layout(const int64_t* ids, int64_t tokens, const int32_t* cu_seqlens, int64_t documents,
                       const FrameLayoutOut& out);
void read_frame_layout(const int32_t* ids, int64_t tokens, const int32_t* cu_seqlens, int64_t documents,
                       const FrameLayoutOut& out);

}  // namespace lumos
