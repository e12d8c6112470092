// A call as Python describes it: nothing here is checked yet (checks.h does).
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "problem.h"

namespace saccade {

// A tensor as Python describes it; strides in elements.  `reach` is the number of bytes from
// `data` to the end of its storage, which bounds the bytes that the tensor may span.
struct TensorArg {
  static constexpr int kMaxDims = 5;
  char* data;
  Dtype dtype;
  int ndim;
  int64_t shape[kMaxDims], stride[kMaxDims];
  int64_t reach;
};

struct ViewArg {
  ViewKind kind = ViewKind::dense;
  TensorArg k, v;                                   // the recent tokens of a quantized view
  std::vector<Span> spans;                          // dense; empty: slot i holds position i
  std::optional<TensorArg> table, lengths, positions;  // paged, ragged
  std::optional<TensorArg> k_qdata, k_scale, k_offset, v_qdata, v_scale, v_offset;
  int64_t bits_k = 0, bits_v = 0, k_group = 0;
};

struct CallArg {
  TensorArg q, out;
  std::optional<TensorArg> lse;
  ViewArg kv;
  bool causal = true;
  int64_t window = -1, sinks = 0;  // window: -1 for none
  double scale = 1, softcap = 0;   // softcap: 0 for none
  int64_t q_offset = 0;
  std::optional<TensorArg> q_offsets, sink_logits, alibi, key_padding, lengths, cu_q, cu_k;
  std::optional<TensorArg> blocks, attn_mask;
  int64_t q_block = 0, k_block = 0;
  std::optional<TensorArg> received;  // what each key receives, and whether the largest weight
  bool largest = false;
  bool hadamard = false;  // keys and values were stored Hadamard-transformed; q was not
  int64_t threads = 1;
};

// The backward pass: `call` as in the forward pass (its out and lse are read), and the gradients.
struct BackwardArg {
  CallArg call;
  TensorArg d_out, delta, dq, dk, dv;  // dq: [kv_chunks, batch, heads, q_len, padded head_dim]
};

}  // namespace saccade
