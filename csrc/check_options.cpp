// Mask, softcap, sink logits, ALiBi, padding, block selection and attn_mask.
#include <algorithm>

#include "checker.h"

namespace saccade {

void Checker::check_mask() {
  p_.causal = c_.causal;
  require(c_.window == -1 || (c_.window >= 1 && c_.causal),
          "window must be at least 1, and causal.");
  require(c_.sinks >= 0, "sinks must not be negative.");
  p_.window = c_.window == -1 || c_.window > 2 * kMaxPosition ? kUnlimited : c_.window;
  p_.sinks = std::min(c_.sinks, kMaxPosition);
  require(c_.scale == c_.scale, "scale must be a number.");
  require(c_.softcap >= 0, "softcap must be positive.");
  p_.scale = (float)c_.scale;
  p_.softcap = (float)c_.softcap;
}

void Checker::check_sink_logits() {
  if (!c_.sink_logits) return;
  check_tensor(*c_.sink_logits, "sink_logits", 1);
  check_dtype(*c_.sink_logits, "sink_logits", Dtype::f32);
  check_shape(*c_.sink_logits, "sink_logits", {p_.heads});
  p_.sink_logits = (const float*)c_.sink_logits->data;
}

void Checker::check_alibi() {
  if (!c_.alibi) return;
  check_tensor(*c_.alibi, "alibi_slopes", 2);
  check_dtype(*c_.alibi, "alibi_slopes", Dtype::f32);
  require(c_.alibi->shape[0] == 1 || c_.alibi->shape[0] == batch_,
          "alibi_slopes must have batch 1 or that of the call.");
  require(c_.alibi->shape[1] == p_.heads, "alibi_slopes must have one slope for each head.");
  p_.alibi = (const float*)c_.alibi->data;
  p_.alibi_batch = broadcast_stride(*c_.alibi, 0);
}

void Checker::check_key_padding() {
  if (!c_.key_padding) return;
  const TensorArg& x = *c_.key_padding;
  check_tensor(x, "key_padding", 2, false);
  check_dtype(x, "key_padding", Dtype::boolean);
  require(x.shape[0] == batch_ && x.shape[1] >= end_, "key_padding must be [batch, kv_len].");
  p_.key_padding = {(const uint8_t*)x.data, x.stride[0], 0, 0, x.stride[1]};
}

void Checker::check_blocks() {
  if (!c_.blocks) return;
  const TensorArg& x = *c_.blocks;
  check_tensor(x, "blocks", 4, false);
  check_dtype(x, "blocks", Dtype::boolean);
  check_broadcast(x, "blocks", batch_, p_.kv_heads);
  require(c_.q_block >= 1 && c_.k_block >= 1, "block sizes must be at least 1.");
  require(c_.q_block <= kMaxPosition && c_.k_block <= kMaxPosition, "block sizes are too large.");
  require(x.shape[2] * c_.q_block >= q_len_ && x.shape[3] * c_.k_block >= end_,
          "blocks must cover all queries and keys.");
  p_.blocks = grid(x);
  p_.q_block = c_.q_block;
  p_.k_block = c_.k_block;
}

void Checker::check_attn_mask() {
  if (!c_.attn_mask) return;
  const TensorArg& x = *c_.attn_mask;
  check_tensor(x, "attn_mask", 4, false);
  check_dtype(x, "attn_mask", Dtype::boolean);
  check_broadcast(x, "attn_mask", batch_, p_.heads);
  require(x.shape[2] >= q_len_ && x.shape[3] >= end_, "attn_mask must cover queries and keys.");
  p_.attn_mask = grid(x);
}

}  // namespace saccade
