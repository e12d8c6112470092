// The state of a few rows (query heads x queries, at most 8) during the loop over their keys.
#pragma once
#include "loaders.h"
#include "pack.h"
#include "softmax.h"
#include "split_kv.h"

namespace saccade::SACCADE_TARGET {

constexpr int kMaxRows = 8;
#if defined(SACCADE_AVX2) && !defined(SACCADE_AVX512)
constexpr int kAccumulators = 8;  // of 16 registers
#else
constexpr int kAccumulators = 16;
#endif

class DecodeState {
 protected:
  DecodeState(const Problem& p, const Partials& partials) : p_(p), partials_(partials) {}

  // Rows in groups of 4, 2 or 1.
  template <class Visit>
  void each_group(Visit&& visit) {
    for (int row = 0; row < num_rows_; row += 4) {
      const int rest = num_rows_ - row;
      if (rest >= 3) visit.template operator()<4>(row);
      if (rest == 2) visit.template operator()<2>(row);
      if (rest == 1) visit.template operator()<1>(row);
    }
  }

  void start_rows(const WorkItem& item) {
    item_ = &item;
    sequence_ = &p_.sequences[item.sequence];
    num_rows_ = (int)item.num_rows();
    factor_ = query_factor(p_);
#if defined(SACCADE_DOT)
    bf16_dot_ = k_in_pairs() && p_.q.dtype == Dtype::bf16 && p_.head_dim % (2 * W) == 0;
#endif
    for (int i = 0; i < kMaxRows; ++i) start_row(i);
  }

  void start_row(int i) {
    rows_[i] = make_row(p_, *sequence_, item_->head, min(item_->row_begin + i, item_->row_end - 1));
    const bool sink = p_.sink_logits && item_->split == 0;  // a first score without a value
    m_[i] = sink ? p_.sink_logits[rows_[i].head] * kLog2e : -kInf;
    std::memset(l_[i], 0, sizeof l_[i]);
    if (m_[i] != -kInf) l_[i][0] = 1.f;
    if (i < (num_rows_ + 3) / 4 * 4) {  // whole groups of rows are computed
      const size_t q_bytes = sizeof(float) * (size_t)padded_dim((int)p_.head_dim);
      std::memset(q_[i], 0, q_bytes);
      std::memset(o_[i], 0, sizeof(float) * (size_t)padded_dim((int)p_.value_dim));
      std::memset(q_pairs_[i], 0, q_bytes / 2);
    }
    if (i < num_rows_) load_query(i);
  }

  void load_query(int i) {
    const int dim = (int)p_.head_dim;
    const char* q = row_data(p_.q, *sequence_, rows_[i]);
    widen_row(p_.q.dtype, q, dim, factor_, q_[i]);
    if (k_in_pairs()) split_pairs(q_[i], dim);
    if (bf16_dot_) std::memcpy(q_pairs_[i], q, dim * sizeof(Bf16));
  }

  bool k_in_pairs() const {
    return p_.kv.k.dtype == Dtype::bf16 && p_.kv.kind != ViewKind::quantized;
  }

  bool o_in_pairs() const {
    return p_.kv.v.dtype == Dtype::bf16 && p_.kv.kind != ViewKind::quantized;
  }

  // Rows that may be kept as even and odd channels take room for full chunks.
  static int padded_dim(int dim) { return (int)ceil_div(dim, 2 * W) * 2 * W; }

  int padded_count() const { return (int)ceil_div(tile_->count, kTilePad) * kTilePad; }

  // Whether blocks or attn_mask may differ from row to row.
  bool masked_by_row() const {
    return p_.attn_mask.data || (has_blocks(p_) && p_.q_block < sequence_->q_len);
  }

  // The key positions of the tile for one row: kNoKey where blocks or attn_mask hide the key.
  const int32_t* positions_of(int row) {
    if (!masked_by_row()) return tile_->positions;
    const Row& r = rows_[row];
    const ByteGrid& g = p_.attn_mask;
    for (int j = 0; j < kTile; ++j) {
      const int32_t at = j < tile_->count ? tile_->positions[j] : kNoKey;
      bool visible = at != kNoKey;
      if (visible && g.data)
        visible =
            g.data[sequence_->batch * g.batch + r.head * g.head + r.query * g.row + at * g.column];
      if (visible && has_blocks(p_))
        visible = block_allowed(p_, sequence_->batch, item_->head, r.query / p_.q_block,
                                at / p_.k_block);
      row_positions_[j] = visible ? at : kNoKey;
    }
    return row_positions_;
  }

  // Makes `current` the tile to compute, and notes how long the rows are that are prefetched.
  void set_tiles(const Tile& current, const Tile& next) {
    tile_ = &current;
    next_ = &next;
    k_bytes_ = row_bytes(next.quantized, p_.kv.k, p_.kv.quantized_k, p_.head_dim);
    v_bytes_ = row_bytes(current.quantized, p_.kv.v, p_.kv.quantized_v, p_.value_dim);
    stored_ = p_.value_dim / (current.quantized && p_.kv.quantized_v.bits == 4 ? 2 : 1);
  }

  static int64_t row_bytes(bool quantized, const Strided& rows, const QuantizedTensor& x,
                           int64_t dim) {
    if (quantized) return dim * x.bits / 8;
    return dim * (rows.dtype == Dtype::f32 ? 4 : 2);
  }

  // Into L2: asking for L1 would block the few buffers that its own misses need (measured: half the
  // speed).
  static constexpr int kToL2 = 2;

  // Prefetches bytes [begin, end) of N rows that will be read soon, during the arithmetic:
  // spread evenly, because the requests in flight are few.
  template <int N>
  SACCADE_INLINE void prefetch(const char* const* rows, int first, int count, int64_t begin,
                               int64_t end) {
    if (first + N > count) return;
    for (int i = 0; i < N; ++i)
      for (int64_t b = begin; b < end; b += 64) __builtin_prefetch(rows[first + i] + b, 0, kToL2);
  }

  const Problem& p_;
  const Partials& partials_;
  const WorkItem* item_ = nullptr;
  const Sequence* sequence_ = nullptr;
  int num_rows_ = 0;
  int64_t k_bytes_ = 0, v_bytes_ = 0;  // of the rows that are prefetched
  int64_t stored_ = 1;                 // elements of a stored value
  bool bf16_dot_ = false;              // scores come from products of bfloat16 pairs
  float factor_ = 1.f;
  Row rows_[kMaxRows];
  alignas(64) float q_[kMaxRows][kDimPad];
  alignas(64) Bf16 q_pairs_[kMaxRows][kDimPad];
  alignas(64) float o_[kMaxRows][kDimPad];
  alignas(64) float scores_[kMaxRows][kScoreStride];
  alignas(64) float l_[kMaxRows][W];
  float m_[kMaxRows + W], alpha_[kMaxRows + W];
  int32_t row_positions_[kTile];
  const Tile* tile_ = nullptr;  // the one being computed
  const Tile* next_ = nullptr;  // the one being prefetched
};

}  // namespace saccade::SACCADE_TARGET
