#include "checks.h"

#include "checker.h"

namespace saccade {

void Checker::run() {
  p_ = Problem{};
  check_queries();
  check_view();
  check_outputs();
  check_mask();
  check_sink_logits();
  check_alibi();
  check_key_padding();
  check_blocks();
  check_attn_mask();
  check_received();
  make_sequences();
  p_.kv.spans = r_.spans.data();
  p_.kv.num_spans = (int64_t)r_.spans.size();
  p_.sequences = r_.sequences.data();
  p_.num_sequences = (int64_t)r_.sequences.size();
}

void Checker::check_queries() {
  check_tensor(c_.q, "q", 4);
  require(is_float(c_.q.dtype), "q must be float32, bfloat16 or float16.");
  batch_ = c_.q.shape[0];
  p_.heads = c_.q.shape[1];
  q_len_ = c_.q.shape[2];
  p_.head_dim = c_.q.shape[3];
  require(p_.head_dim >= 1 && p_.head_dim <= kMaxDim, "head_dim must be 1 to 576.");
  require(q_len_ <= kMaxPosition, "q_len is too large.");
  p_.q = strided(c_.q);
  require(c_.threads >= 1 && c_.threads <= 4096, "threads must be 1 to 4096.");
  p_.threads = (int)c_.threads;
  p_.hadamard = c_.hadamard;
}

void Checker::check_outputs() {
  check_tensor(c_.out, "out", 4);
  check_dtype(c_.out, "out", c_.q.dtype);
  check_shape(c_.out, "out", {batch_, p_.heads, q_len_, p_.value_dim});
  check_written(c_.out, "out");
  p_.out = strided(c_.out);
  if (!c_.lse) return;
  check_tensor(*c_.lse, "lse", 3);
  check_dtype(*c_.lse, "lse", Dtype::f32);
  check_shape(*c_.lse, "lse", {batch_, p_.heads, q_len_});
  check_written(*c_.lse, "lse");
  check_apart(c_.out, "out", *c_.lse, "lse");
  p_.lse = (float*)c_.lse->data;
  p_.lse_batch = c_.lse->stride[0];
  p_.lse_head = c_.lse->stride[1];
}

void Checker::check_received() {
  if (!c_.received) return;
  const TensorArg& x = *c_.received;
  check_tensor(x, "received", 3);
  check_dtype(x, "received", Dtype::f32);
  const int64_t keys = x.shape[2];
  require(c_.kv.kind == ViewKind::ragged || keys >= end_,
          "received must have a place for each key.");
  check_shape(x, "received", {batch_, p_.kv_heads, keys});
  const bool heads = x.stride[1] == keys || p_.kv_heads == 1;
  const bool rows = x.stride[0] == p_.kv_heads * keys || batch_ == 1;
  require(is_empty(x) || (heads && rows), "received must be contiguous.");
  require(!c_.cu_q, "received cannot be computed for packed sequences.");
  check_written(x, "received");
  check_apart(x, "received", c_.out, "out");
  if (c_.lse) check_apart(x, "received", *c_.lse, "lse");
  p_.received = (float*)x.data;
  p_.received_batch = batch_;
  p_.received_end = keys;
  p_.receives = true;
  p_.largest = c_.largest;
}

void Checker::check_written(const TensorArg& x, const char* name) {
  check_no_self_overlap(x, name);
  check_apart(x, name, c_.q, "q");
  check_apart(x, name, c_.kv.k, "k");
  check_apart(x, name, c_.kv.v, "v");
  for (const auto* other : {&c_.kv.table, &c_.kv.lengths, &c_.kv.positions, &c_.kv.k_qdata,
                            &c_.kv.k_scale, &c_.kv.k_offset, &c_.kv.v_qdata, &c_.kv.v_scale,
                            &c_.kv.v_offset})
    if (*other) check_apart(x, name, **other, "the key/value view");
}

void check(const CallArg& call, CheckedProblem& checked) { Checker(call, checked).run(); }

}  // namespace saccade
