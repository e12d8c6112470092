#include "call_shape.h"

#include <algorithm>

#include "check_tensor.h"

namespace saccade {
namespace {

void check_shape(const CallShape& s) {
  for (int64_t n : {s.batch, s.heads, s.q_len, s.kv_heads, s.kv_len})
    require(n >= 0 && n <= kMaxPosition, "a size is negative or too large.");
  require(s.batch <= kMaxCount / std::max<int64_t>(1, s.heads), "batch and heads are too large.");
  require(s.head_dim >= 1 && s.head_dim <= kMaxDim, "head_dim must be 1 to 576.");
  require(s.value_dim >= 1 && s.value_dim <= kMaxDim, "value_dim must be 1 to 576.");
  require(s.kv_heads >= 1 && s.heads >= 1 && s.heads % s.kv_heads == 0,
          "the query heads must be a multiple of the key/value heads.");
  require(s.window == -1 || (s.window >= 1 && s.causal), "window must be at least 1, and causal.");
  require(s.sinks >= 0, "sinks must not be negative.");
  require(s.q_offset >= -kMaxPosition && s.q_offset <= kMaxPosition - s.q_len + 1,
          "q_offset lies beyond the largest supported position.");
  require((s.q_block == 0) == (s.k_block == 0) && s.q_block >= 0 && s.k_block >= 0,
          "block sizes must be at least 1, or both 0.");
  require(s.transformed_item == 0 || s.transformed_item == 2 || s.transformed_item == 4,
          "an element of q has 2 or 4 bytes, or 0 where queries are not transformed.");
  require(s.threads >= 1 && s.threads <= 4096, "threads must be 1 to 4096.");
}

}  // namespace

void make_problem(const CallShape& s, ShapedProblem& out) {
  check_shape(s);
  Problem& p = out.problem = Problem{};
  p.heads = s.heads;
  p.kv_heads = s.kv_heads;
  p.group = s.heads / s.kv_heads;
  p.head_dim = s.head_dim;
  p.value_dim = s.value_dim;
  p.causal = s.causal;
  p.window = s.window == -1 || s.window > 2 * kMaxPosition ? kUnlimited : s.window;
  p.sinks = std::min(s.sinks, kMaxPosition);
  p.q_block = s.q_block;
  p.k_block = s.k_block;
  p.hadamard = s.transformed_item != 0;
  p.q.dtype = s.transformed_item == 2 ? Dtype::bf16 : Dtype::f32;
  p.threads = (int)s.threads;
  p.receives = s.receives;
  p.received_batch = s.batch;
  p.received_end = s.kv_len;
  if (s.ragged) {  // as many keys in every head: strides of 0
    out.lengths = {(int32_t)s.kv_len};
    p.kv.kind = ViewKind::ragged;
    p.kv.lengths = out.lengths.data();
  }
  out.sequences.clear();
  for (int64_t b = 0; b < s.batch && s.q_len > 0; ++b)
    out.sequences.push_back({b, 0, s.q_len, 0, s.kv_len, s.q_offset});
  p.sequences = out.sequences.data();
  p.num_sequences = (int64_t)out.sequences.size();
}

}  // namespace saccade
