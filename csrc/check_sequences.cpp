// Which queries go with which keys: one sequence a row of the batch, or packed ones (cu_seqlens).
#include <algorithm>

#include "checker.h"

namespace saccade {

void Checker::make_sequences() {
  r_.sequences.clear();
  if (is_empty(c_.q)) return;
  if (c_.cu_q || c_.cu_k) return make_varlen_sequences();
  if (c_.lengths) check_integers(*c_.lengths, "lengths", batch_);
  if (c_.q_offsets) check_integers(*c_.q_offsets, "q_offset", batch_);
  for (int64_t b = 0; b < batch_; ++b) {
    int64_t keys = end_;
    if (c_.kv.kind == ViewKind::paged) keys = integer_at(*c_.kv.lengths, b);
    if (c_.lengths) {
      const int64_t length = integer_at(*c_.lengths, b);
      require(length >= 0, "lengths must not be negative.");
      keys = std::min(keys, length);
    }
    const int64_t offset = c_.q_offsets ? integer_at(*c_.q_offsets, b) : c_.q_offset;
    require(offset >= -kMaxPosition && offset <= kMaxPosition - q_len_ + 1,
            "q_offset lies beyond the largest supported position.");
    r_.sequences.push_back({b, 0, q_len_, 0, keys, offset});
  }
}

void Checker::make_varlen_sequences() {
  require(c_.cu_q && c_.cu_k, "cu_seqlens must be given for queries and keys.");
  require(batch_ == 1 && c_.kv.kind == ViewKind::dense, "cu_seqlens needs one dense packed row.");
  require(!c_.key_padding && !c_.blocks && !c_.attn_mask && !c_.lengths && !c_.q_offsets,
          "cu_seqlens cannot be combined with padding, lengths, blocks or masks.");
  require(c_.cu_q->ndim == 1 && c_.cu_q->shape[0] >= 1, "cu_seqlens must have one dimension.");
  const int64_t n = c_.cu_q->shape[0];
  check_integers(*c_.cu_q, "cu_seqlens of queries", n);
  check_integers(*c_.cu_k, "cu_seqlens of keys", n);
  require(integer_at(*c_.cu_q, 0) == 0 && integer_at(*c_.cu_k, 0) == 0 &&
              integer_at(*c_.cu_q, n - 1) == q_len_ && integer_at(*c_.cu_k, n - 1) == end_,
          "cu_seqlens must rise from 0 to the packed length.");
  for (int64_t i = 0; i + 1 < n; ++i) {
    const int64_t q = integer_at(*c_.cu_q, i), k = integer_at(*c_.cu_k, i);
    const int64_t q_len = integer_at(*c_.cu_q, i + 1) - q, k_len = integer_at(*c_.cu_k, i + 1) - k;
    require(q_len >= 0 && k_len >= 0 && q + q_len <= q_len_ && k + k_len <= end_,
            "cu_seqlens must not fall.");
    r_.sequences.push_back({0, q, q_len, k, k_len, k_len - q_len});
  }
}

}  // namespace saccade
