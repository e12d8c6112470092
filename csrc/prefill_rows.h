// What prefill kernels share, whatever the number format of their products: the rows of a work
// item, which keys each of them attends to, and the walk over the tiles of keys.
//
// A kernel derives from PrefillRows<Kernel> and has: lay_out(arena), pack_queries(), pack_tile(),
// process_strip<MR>(first), and each_strip(visit), which calls visit<MR>(first) for all rows.
#pragma once
#include "arena.h"
#include "pack.h"
#include "received.h"
#include "softmax.h"
#include "split_kv.h"

namespace saccade::SACCADE_TARGET {

template <class Kernel>
class PrefillRows {
 public:
  PrefillRows(const Problem& p, const Partials& partials) : p_(p), partials_(partials) {}

  // Bytes of the memory that `run(item, memory)` lays out.
  static int64_t workspace_bytes(const Problem& p, const WorkItem& item) {
    const Partials none{};
    Kernel kernel(p, none);
    kernel.select(item);
    Arena measure(nullptr);
    kernel.lay_out(measure);
    return measure.bytes();
  }

  void run(const WorkItem& item, void* memory) {
    select(item);
    Arena arena(memory);
    self().lay_out(arena);
    start_rows();
    self().pack_queries();
    const int64_t num_ranges =
        visited_ranges(p_, *sequence_, item.head, item.row_begin / p_.group,
                       (item.row_end - 1) / p_.group, ranges_);
    const Range part = split_range(total_keys(ranges_, num_ranges), item.split, item.splits);
    TileWalk walk(p_, *sequence_, item.head, ranges_, num_ranges, part.start,
                  part.stop - part.start);
    while (walk.next(tile_)) {
      self().pack_tile();
      if (p_.receives) received_.next_tile(tile_);
      note_selection();
      self().each_strip([&]<int MR>(int first) { self().template process_strip<MR>(first); });
    }
    if (p_.receives) add_received();
    write();
  }

 protected:
  // The columns of a tile that a strip of rows computes.
  struct Part {
    Columns visible;  // some row attends to the first and the last of them
    int begin, end;   // the same in full panels
    bool full;        // every row attends to all of them
  };

  // The columns of a tile that a block of queries selects.
  struct Selected {
    int begin, end;  // the first, and one past the last; equal where it selects none
    bool whole;      // all between them
    bool listed;     // whether its positions are in block_positions_
  };

  Kernel& self() { return *static_cast<Kernel*>(this); }

  void select(const WorkItem& item) {
    item_ = &item;
    sequence_ = &p_.sequences[item.sequence];
    num_rows_ = (int)item.num_rows();
    o_stride_ = ceil_div(p_.value_dim, kColumns) * kColumns;
    if (!has_blocks(p_)) return;
    first_block_ = item.row_begin / p_.group / p_.q_block;
    num_blocks_ = (item.row_end - 1) / p_.group / p_.q_block - first_block_ + 1;
  }

  // `strip`: rows of the largest strip, by which the last one may exceed the rows of the item.
  void lay_out_rows(Arena& arena, int strip) {
    padded_rows_ = num_rows_ + strip;
    rows_ = arena.take<Row>(padded_rows_);
    o_ = arena.take<float>(padded_rows_ * o_stride_);
    state_.m = arena.take<float>(padded_rows_ + W);
    state_.alpha = arena.take<float>(padded_rows_ + W);
    state_.l = arena.take<float>(padded_rows_ * W);
    scores_ = arena.take<float>(strip * kScoreStride);
    ranges_ = arena.take<Range>(max_ranges(p_, *sequence_));
    selected_ = arena.take<Selected>(num_blocks_);
    block_positions_ = arena.take<int32_t>(num_blocks_ * kTile);
    row_positions_ = arena.take<int32_t>(strip * kTile);
    if (!p_.receives) return;
    received_.lay_out(arena, p_, *item_, padded_rows_);
    lse_ = arena.take<float>(padded_rows_ + kTilePad);
  }

  void start_rows() {
    received_.start();
    std::memset(o_, 0, padded_rows_ * o_stride_ * sizeof(float));
    std::memset(state_.l, 0, padded_rows_ * W * sizeof(float));
    const bool sinks = p_.sink_logits && item_->split == 0;
    for (int i = 0; i < padded_rows_; ++i) {  // rows past the end repeat the last one
      const int64_t row = min(item_->row_begin + i, item_->row_end - 1);
      rows_[i] = make_row(p_, *sequence_, item_->head, row);
      // A learned sink is a first score without a value.
      state_.m[i] = sinks ? p_.sink_logits[rows_[i].head] * kLog2e : -kInf;
      if (sinks && state_.m[i] != -kInf) state_.l[i * W] = 1.f;
    }
  }

  bool several_blocks() const { return has_blocks(p_) && num_blocks_ > 1; }

  // Which columns of the tile each block of queries selects.
  void note_selection() {
    if (!several_blocks()) return;
    for (int64_t a = 0; a < num_blocks_; ++a) selected_[a] = {0, 0, true, false};
    for (int begin = 0, end; begin < tile_.count; begin = end) {
      end = begin + 1;
      if (tile_.positions[begin] == kNoKey) continue;  // no block of queries needs it
      const int64_t block = tile_.positions[begin] / p_.k_block, stop = (block + 1) * p_.k_block;
      while (end < tile_.count && (tile_.positions[end] < stop || tile_.positions[end] == kNoKey))
        ++end;
      for (int64_t a = 0; a < num_blocks_; ++a) {
        if (!block_allowed(p_, sequence_->batch, item_->head, first_block_ + a, block)) continue;
        Selected& s = selected_[a];
        s.whole = s.begin == s.end || (s.whole && s.end == begin);
        if (s.begin == s.end) s.begin = begin;
        s.end = end;
      }
    }
  }

  // Positions of the tile for a block of queries: kNoKey where it does not select the key.
  const int32_t* block_positions(int64_t a) {
    int32_t* out = block_positions_ + a * kTile;
    if (selected_[a].listed) return out;
    selected_[a].listed = true;
    int64_t block = -1;
    bool allowed = false;
    for (int j = 0; j < kTile; ++j) {
      const int32_t at = j < tile_.count ? tile_.positions[j] : kNoKey;
      if (at != kNoKey && (block < 0 || at >= (block + 1) * p_.k_block)) {
        block = at / p_.k_block;
        allowed = block_allowed(p_, sequence_->batch, item_->head, first_block_ + a, block);
      }
      out[j] = at != kNoKey && allowed ? at : kNoKey;
    }
    return out;
  }

  // Keeps the weights of a strip for what keys receive.
  template <int MR>
  SACCADE_INLINE_MEMBER void keep_weights(int first, int begin, int end) {
    if (p_.receives) received_.keep(first, MR, scores_, kScoreStride, state_.m, begin, end);
  }

  // Rows past the end repeat another one, and do not count.
  void add_received() {
    for (int i = 0; i < padded_rows_; ++i) {
      const float l = hsum(load(state_.l + i * W));
      lse_[i] = i < num_rows_ && l != 0.f ? state_.m[i] + log2_of(l) : kInf;
    }
    int64_t* sums = partials_.received +
                    (sequence_->batch * p_.kv_heads + item_->head) * p_.received_end;
    received_.add(p_, sums, received_unit(p_), lse_);
  }

  // The key positions of the tile for one row: kNoKey where blocks or attn_mask hide the key.
  const int32_t* positions_of(int row, int slot) {
    const int32_t* base = tile_.positions;
    if (several_blocks()) base = block_positions(rows_[row].query / p_.q_block - first_block_);
    if (!p_.attn_mask.data) return base;
    const ByteGrid& g = p_.attn_mask;
    const uint8_t* mask = g.data + sequence_->batch * g.batch + rows_[row].head * g.head +
                          rows_[row].query * g.row;
    int32_t* out = row_positions_ + slot * kTile;
    for (int j = 0; j < kTile; ++j) {
      const bool real = j < tile_.count && base[j] != kNoKey;
      out[j] = real && mask[base[j] * g.column] ? base[j] : kNoKey;
    }
    return out;
  }

  // What rows first .. last, in the order of positions, attend to.
  Part part_of(int first, int last) const {
    Columns visible = visible_columns(rows_[first], rows_[last], (int32_t)p_.sinks, tile_);
    bool masked_by_row = p_.attn_mask.data;
    if (several_blocks()) masked_by_row |= !narrow(first, last, visible);
    const int begin = visible.begin / kColumns * kColumns;
    const int end = (int)ceil_div(visible.end, kColumns) * kColumns;
    const bool full = end <= tile_.count && !tile_.holes && !masked_by_row &&
                      all_visible(rows_[first], rows_[last], (int32_t)p_.sinks, tile_);
    return {visible, begin, end, full};
  }

  // Narrows columns to those that some row of first .. last selects; false where not all of the
  // panels that hold them are selected by every row.
  bool narrow(int first, int last, Columns& columns) const {
    const int64_t low = rows_[first].query / p_.q_block - first_block_;
    const int64_t high = rows_[last].query / p_.q_block - first_block_;
    int begin = kTile, end = 0;
    for (int64_t a = low; a <= high; ++a) {
      if (selected_[a].begin == selected_[a].end) continue;
      begin = selected_[a].begin < begin ? selected_[a].begin : begin;
      end = selected_[a].end > end ? selected_[a].end : end;
    }
    columns.begin = columns.begin > begin ? columns.begin : begin;
    columns.end = columns.end < end ? columns.end : end;
    if (columns.begin >= columns.end) columns.begin = columns.end = 0;
    bool all = true;
    for (int64_t a = low; a <= high; ++a)
      all &= selected_[a].whole && selected_[a].begin <= columns.begin / kColumns * kColumns &&
             selected_[a].end >= ceil_div(columns.end, kColumns) * kColumns;
    return all;
  }

  // `factor`: of scores, 1 where queries were multiplied by it.
  Scoring scoring(const Part& part, float factor) const {
    return {!part.full, p_.alibi != nullptr, p_.softcap * kLog2e, (int32_t)p_.sinks, factor};
  }

  // o = o * alpha + P V, where a masked value may be NaN or infinite, of which even 0 times is NaN.
  template <int MR, class WeightOf, class ValueOf>
  void accumulate_visible(int first, Columns columns, WeightOf&& weight_of, ValueOf&& value_of) {
    for (int i = 0; i < MR; ++i) {
      float* o = o_ + (first + i) * o_stride_;
      for (int64_t d = 0; d < p_.value_dim; ++d) o[d] *= state_.alpha[first + i];
      const int32_t* positions = positions_of(first + i, i);
      for (int j = columns.begin; j < columns.end; ++j) {
        if (!is_visible(rows_[first + i], (int32_t)p_.sinks, positions[j])) continue;
        const float weight = weight_of(i, j);
        for (int64_t d = 0; d < p_.value_dim; ++d) o[d] += weight * value_of(j, d);
      }
    }
  }

  void write() {
    for (int i = 0; i < num_rows_; ++i)
      finish_row(p_, *item_, partials_, i, rows_[i], o_ + i * o_stride_, state_.m[i],
                 hsum(load(state_.l + i * W)));
  }

  const Problem& p_;
  const Partials& partials_;
  const WorkItem* item_ = nullptr;
  const Sequence* sequence_ = nullptr;
  int num_rows_ = 0, padded_rows_ = 0;
  int64_t o_stride_ = 0, first_block_ = 0, num_blocks_ = 1;
  bool values_finite_ = true;
  Row* rows_ = nullptr;
  float *o_ = nullptr, *scores_ = nullptr;
  Softmax state_{};
  Range* ranges_ = nullptr;
  Selected* selected_ = nullptr;
  int32_t *block_positions_ = nullptr, *row_positions_ = nullptr;
  Received received_;
  float* lse_ = nullptr;
  Tile tile_;
};

// Strips of kRows rows, the rest in one strip of the smallest size that holds it.
template <class Visit>
SACCADE_INLINE void strips_of_rows(int num_rows, Visit&& visit) {
  int row = 0;
  for (; row + kRows <= num_rows; row += kRows) visit.template operator()<kRows>(row);
  const int rest = num_rows - row;
  if (rest == 0) return;
  if (rest > 8) return visit.template operator()<kRows>(row);
  if (kRows > 8 && rest > 4) return visit.template operator()<8>(row);
  if (rest > 4) return visit.template operator()<kRows>(row);
  if (rest > 2) return visit.template operator()<4>(row);
  visit.template operator()<2>(row);
}

}  // namespace saccade::SACCADE_TARGET
