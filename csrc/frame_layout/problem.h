// The description of a packed stream of text and frames, read off its token ids (lumos_kernels/layout.py).
#pragma once

#include <cstdint>

namespace lumos {

/// Where the results go. All int32 [tokens] but for positions, three of these in a row, and content, bool [tokens].
struct FrameLayoutOut {
  int32_t* positions;
  bool* content;
  int32_t* frame_index;
  int32_t* kv_start;
  int32_t* kv_end;
  int32_t* q_start;
  int32_t* q_end;
};

/// Document b is the tokens cu_seqlens[b] <= i < cu_seqlens[b + 1]; there is at least one wherever there are tokens.
void read_frame_layout(const int64_t* ids, int64_t tokens, const int32_t* cu_seqlens, int64_t documents,
                       const FrameLayoutOut& out);
void read_frame_layout(const int32_t* ids, int64_t tokens, const int32_t* cu_seqlens, int64_t documents,
                       const FrameLayoutOut& out);

}  // namespace lumos
