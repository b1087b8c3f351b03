// Reads frame_layout on the CPU. The specification is lumos_kernels/frame_layout/reference.py.
//
// A frame is a start token, the numbers of grid rows and columns, then for each row its codes and a new line, then an
// end token. Its content is the codes and new lines. Content token `offset` lies in grid row offset / line and column
// offset % line, where line = columns + 1. With p the index in its document of the first content token,
//     content:  time = p + kTimeStride * frame,  height = p + kSpaceStride * row,  width = p + kSpaceStride * column
//     other:    time = height = width = index in the document
//     kv_start = the document's start
//     kv_end   = the index behind the frame's end token for the tokens of a frame, i + 1 for the others
//
// One pass over the tokens holds the latest document and frame in registers. A second pass transposes the limits.
#include "frame_layout/problem.h"

#include <algorithm>

namespace lumos {
namespace {

// Token ids and strides of Lumos-1, as in lumos_kernels/token_ids.py and lumos_kernels/frame_layout/frames.py.
constexpr int64_t kFrameStart = 8197, kNumberBase = 8804, kMask = 9003;
constexpr int32_t kGridUnit = 4, kFrameHeader = 3, kTimeStride = 4, kSpaceStride = 8;

/// Returns the number of grid rows or columns that the id at `at` of a frame header encodes, or 0 if it encodes none.
template <typename Id>
int32_t header_number(const Id* ids, int64_t tokens, int64_t at) {
  if (at >= tokens) return 0;
  const int64_t id = ids[at];
  return id > kNumberBase && id < kMask ? kGridUnit * static_cast<int32_t>(id - kNumberBase) : 0;
}

/// The latest frame of the document. Before the first one, the defaults put no token inside a frame.
struct FrameState {
  int32_t content = 0;  // index of the first content token, kFrameHeader behind the frame start
  int32_t codes = -1;   // number of content tokens, new lines included; -1 before the first frame
  int32_t line = 1;     // number of content tokens of a grid row, new line included
  int32_t number = -1;  // index of the frame in its document
};

/// Writes the number of queries with limit <= j for every key j. limit never falls, so that these are the first queries
/// of the stream. `read` keeps kv_end from falling.
void transpose(const int32_t* limit, int64_t tokens, int32_t* queries_before) {
  int64_t query = 0;
  for (int64_t key = 0; key < tokens; ++key) {
    while (query < tokens && limit[query] <= key) ++query;
    queries_before[key] = static_cast<int32_t>(query);
  }
}

template <typename Id>
void read(const Id* ids, int64_t tokens, const int32_t* cu_seqlens, int64_t documents, const FrameLayoutOut& out) {
  int32_t* const time = out.positions;
  int32_t* const height = time + tokens;
  int32_t* const width = height + tokens;
  int64_t document = 0;
  int32_t begin = tokens ? cu_seqlens[0] : 0, end = tokens ? cu_seqlens[1] : 0;
  int32_t first_content = 0;  // index in the document of its first frame's first content token
  int32_t previous_kv_end = 0;
  FrameState frame;
  for (int32_t i = 0; i < tokens; ++i) {
    while (i >= end && document + 1 < documents) {
      ++document;
      begin = cu_seqlens[document];
      end = cu_seqlens[document + 1];
      frame = FrameState{};
    }
    if (ids[i] == kFrameStart) {
      frame.content = i + kFrameHeader;
      frame.line = header_number(ids, tokens, i + 2) + 1;
      frame.codes = header_number(ids, tokens, i + 1) * frame.line;
      if (++frame.number == 0) first_content = frame.content - begin;
    }
    const int32_t offset = i - frame.content;
    const bool inside = offset <= frame.codes && frame.codes >= 0;
    const bool content = inside && offset >= 0 && offset < frame.codes;
    const int32_t row = content ? offset / frame.line : 0;
    const int32_t text = i - begin;
    time[i] = content ? first_content + kTimeStride * frame.number : text;
    height[i] = content ? first_content + kSpaceStride * row : text;
    width[i] = content ? first_content + kSpaceStride * (offset - row * frame.line) : text;
    out.content[i] = content;
    out.frame_index[i] = content ? frame.number : -1;
    out.kv_start[i] = begin;
    // In a malformed stream a frame may start before the last one ended. The maximum keeps kv_end from falling.
    const int32_t kv_end = inside ? std::min(frame.content + frame.codes + 1, end) : i + 1;
    previous_kv_end = out.kv_end[i] = std::max(kv_end, previous_kv_end);
  }
  transpose(out.kv_end, tokens, out.q_start);
  transpose(out.kv_start, tokens, out.q_end);
}

}  // namespace

void read_frame_layout(const int64_t* ids, int64_t tokens, const int32_t* cu_seqlens, int64_t documents,
                       const FrameLayoutOut& out) {
  read(ids, tokens, cu_seqlens, documents, out);
}

void read_frame_layout(const int32_t* ids, int64_t tokens, const int32_t* cu_seqlens, int64_t documents,
                       const FrameLayoutOut& out) {
  read(ids, tokens, cu_seqlens, documents, out);
}

}  // namespace lumos
