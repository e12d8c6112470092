// One attention problem as plain numbers and pointers, after all checks (checks.h).
//
// Everything here is shared by all SIMD targets, so this file holds data and no code: an inline
// function compiled twice with different instruction sets could be merged into the wrong one.
#pragma once
#include <cstdint>

namespace saccade {

enum class Dtype : int { f32, bf16, f16, u8, i32, i64, boolean };

// Strides are in bytes throughout; the last dimension always has unit stride.
struct Strided {
  char* data;
  Dtype dtype;
  int64_t batch, head, row;
};

// `length` consecutive slots from `slot` hold the consecutive positions from `position`.
struct Span {
  int64_t slot, position, length;
};

// Unsigned integers with a float16 scale and offset: x = qdata * scale + offset.
struct QuantizedTensor {
  Strided qdata, scale, offset;
  int bits;
  int64_t group;  // tokens that share a scale (keys) or channels that do (values)
};

enum class ViewKind : int { dense, paged, ragged, quantized };

struct View {
  ViewKind kind;
  Strided k, v;  // dense; pages (batch = page); ragged pages; the recent tokens of a quantized view
  const Span* spans;
  int64_t num_spans;
  // paged and ragged
  const int32_t* table;
  int64_t table_batch, table_head;  // in elements
  int64_t page_size;
  const int32_t* positions;  // ragged: absolute position of each slot
  int64_t positions_page;    // in elements
  const int32_t* lengths;    // ragged: keys of each (row, head)
  int64_t lengths_batch, lengths_head;
  // quantized
  QuantizedTensor quantized_k, quantized_v;
  int64_t num_quantized;  // tokens; the recent ones follow
};

// Queries with keys of their own: a row of the batch, or a sequence packed into a row (varlen).
struct Sequence {
  int64_t batch;
  int64_t q_begin, q_len;  // in the q tensor
  int64_t k_begin, k_len;  // in view positions; mask position p is view position k_begin + p
  int64_t q_offset;        // mask position of the first query
};

// A boolean tensor [batch | 1, heads | 1, rows, columns], strides 0 where broadcast.
struct ByteGrid {
  const uint8_t* data;
  int64_t batch, head, row, column;
};

constexpr int kMaxDim = 576;
constexpr int64_t kDqPad = 32;  // rows of dq are padded to this, whatever the target
constexpr int64_t kUnlimited = int64_t{1} << 40;

struct Problem {
  int64_t heads, kv_heads, group, head_dim, value_dim;
  Strided q, out;
  float* lse;  // contiguous [batch, heads, q_len], or null
  int64_t lse_batch, lse_head;
  View kv;
  const Sequence* sequences;
  int64_t num_sequences;
  bool causal;
  int64_t window, sinks;  // window: kUnlimited where there is none
  float scale, softcap;   // softcap: 0 where there is none
  const float* sink_logits;
  const float* alibi;
  int64_t alibi_batch;
  ByteGrid key_padding;  // row unused
  ByteGrid blocks;
  int64_t q_block, k_block;  // 0 where there are no blocks
  ByteGrid attn_mask;
  bool hadamard;  // q and out are still to be transformed (hadamard.h)
  // What each key receives (received.h): contiguous [received_batch, kv_heads, received_end].
  float* received;
  int64_t received_batch, received_end;
  bool receives, largest;  // `receives` alone where there are no tensors yet
  int threads;
};

// What the backward pass adds to the problem of its forward pass (dense views).
struct Gradients {
  const Problem* problem;
  Strided d_out, dk, dv;
  const float *lse, *delta;     // contiguous [batch, heads, q_len]
  int64_t row_batch, row_head;  // their strides
  float* dq;                    // [kv_chunks][batch][heads][q_len][head_dim padded to kDqPad]
  int64_t dq_chunk, num_chunks;
};

}  // namespace saccade
