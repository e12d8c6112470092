// Many queries: strips of rows against packed tiles of keys, everything float32 in cache.
//
// A work item loops over the tiles of keys that its rows attend to.  A tile is packed once; then every
// strip of MR rows computes its scores (QK^T), takes the online-softmax step while they are still
// in L1, and adds P V to its accumulators.  Strips for which the full tile is masked skip it, and
// strips that attend to all of it skip the mask.
#pragma once
#include "arena.h"
#include "micro_kernel.h"
#include "pack.h"
#include "softmax.h"
#include "split_kv.h"
#include "workspace.h"

namespace saccade::SACCADE_TARGET {

class Prefill {
 public:
  Prefill(const Problem& p, const Partials& partials) : p_(p), partials_(partials) {}

  // Bytes of the workspace that `run(item)` lays out.
  static int64_t workspace_bytes(const Problem& p, const WorkItem& item) {
    const Partials none{};
    Prefill prefill(p, none);
    prefill.select(item);
    Arena measure(nullptr);
    prefill.lay_out(measure);
    return measure.bytes();
  }

  void run(const WorkItem& item) {
    select(item);
    Arena arena(workspace(WorkspaceSlot::item, (size_t)workspace_bytes(p_, item)));
    lay_out(arena);
    start_rows();
    pack_queries();
    const int64_t num_ranges =
        visited_ranges(p_, *sequence_, item.head, item.row_begin / p_.group,
                       (item.row_end - 1) / p_.group, ranges_);
    const Range part = split_range(total_keys(ranges_, num_ranges), item.split, item.splits);
    TileWalk walk(p_, *sequence_, item.head, ranges_, num_ranges, part.start,
                  part.stop - part.start);
    Packer<kColumns> packer(p_, sequence_->batch, item.head);
    while (walk.next(tile_)) {
      packer.keys(tile_, k_panels_);
      values_finite_ = packer.values(tile_, v_panels_);
      apply_block_mask();
      process_tile();
    }
    write();
  }

 private:
  // Strips of kRows rows, the rest in one strip of the smallest size that holds it.
  template <class Visit>
  void each_strip(Visit&& visit) {
    int row = 0;
    for (; row + kRows <= num_rows_; row += kRows) visit.template operator()<kRows>(row);
    const int rest = num_rows_ - row;
    if (rest == 0) return;
    if (rest > 8) return visit.template operator()<kRows>(row);
    if (kRows > 8 && rest > 4) return visit.template operator()<8>(row);
    if (rest > 4) return visit.template operator()<kRows>(row);
    if (rest > 2) return visit.template operator()<4>(row);
    visit.template operator()<2>(row);
  }

  void select(const WorkItem& item) {
    item_ = &item;
    sequence_ = &p_.sequences[item.sequence];
    num_rows_ = (int)item.num_rows();
    o_stride_ = ceil_div(p_.value_dim, kColumns) * kColumns;
    if (!has_blocks(p_)) return;
    first_block_ = item.row_begin / p_.group / p_.q_block;
    num_blocks_ = (item.row_end - 1) / p_.group / p_.q_block - first_block_ + 1;
  }

  void lay_out(Arena& arena) {
    const int64_t rows = num_rows_ + kRows, dim = p_.head_dim;
    rows_ = arena.take<Row>(rows);
    q_ = arena.take<float>(rows * dim);
    o_ = arena.take<float>(rows * o_stride_);
    state_.m = arena.take<float>(rows + W);
    state_.alpha = arena.take<float>(rows + W);
    state_.l = arena.take<float>(rows * W);
    k_panels_ = arena.take<float>(kTile * dim);
    v_panels_ = arena.take<float>(kTile * o_stride_);
    scores_ = arena.take<float>(kRows * kScoreStride);
    ranges_ = arena.take<Range>(max_ranges(p_, *sequence_));
    block_positions_ = arena.take<int32_t>(num_blocks_ * kTile);
    row_positions_ = arena.take<int32_t>(kRows * kTile);
  }

  void start_rows() {
    std::memset(o_, 0, (num_rows_ + kRows) * o_stride_ * sizeof(float));
    std::memset(state_.l, 0, (num_rows_ + kRows) * W * sizeof(float));
    const bool sinks = p_.sink_logits && item_->split == 0;
    for (int i = 0; i < num_rows_ + kRows; ++i) {  // rows past the end repeat the last one
      const int64_t row = min(item_->row_begin + i, item_->row_end - 1);
      rows_[i] = make_row(p_, *sequence_, item_->head, row);
      // A learned sink is a first score without a value.
      state_.m[i] = sinks ? p_.sink_logits[rows_[i].head] * kLog2e : -kInf;
      if (sinks && state_.m[i] != -kInf) state_.l[i * W] = 1.f;
    }
  }

  // Strips [head_dim][MR], multiplied by scale * log2(e) (or scale / softcap).
  void pack_queries() {
    const float factor = query_factor(p_);
    each_strip([&]<int MR>(int first) {
      for (int i = 0; i < MR; ++i) pack_query(first + i, q_ + first * p_.head_dim + i, MR, factor);
    });
  }

  void pack_query(int row, float* out, int stride, float factor) {
    const int dim = (int)p_.head_dim;
    alignas(64) float x[kDimPad];
    widen_row(p_.q.dtype, row_data(p_.q, *sequence_, rows_[row]), dim, factor, x);
    for (int d = 0; d < dim; ++d) out[(int64_t)d * stride] = x[d];
  }

  // Positions of the tile for each block of queries: kNoKey where it does not select the key.
  void apply_block_mask() {
    if (!has_blocks(p_) || num_blocks_ == 1) return;
    for (int64_t b = 0; b < num_blocks_; ++b) {
      for (int j = 0; j < kTile; ++j) {
        const int32_t at = tile_.positions[j];
        const bool selected = j < tile_.count && at != kNoKey &&
                              block_allowed(p_, sequence_->batch, item_->head, first_block_ + b,
                                            at / p_.k_block);
        block_positions_[b * kTile + j] = selected ? at : kNoKey;
      }
    }
  }

  // The key positions of the tile for one row: kNoKey where blocks or attn_mask hide the key.
  const int32_t* positions_of(int row, int slot) {
    const int32_t* base = tile_.positions;
    if (has_blocks(p_) && num_blocks_ > 1)
      base = block_positions_ + (rows_[row].query / p_.q_block - first_block_) * kTile;
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

  void process_tile() {
    each_strip([&]<int MR>(int first) { process_strip<MR>(first); });
  }

  // Whether every row of a strip attends to every one of these columns.
  bool is_full(int first, int last, Columns columns) const {
    const bool cut = ceil_div(columns.end, kColumns) * kColumns > tile_.count || tile_.holes;
    const bool masked_by_row = p_.attn_mask.data || (has_blocks(p_) && num_blocks_ > 1);
    return all_visible(rows_[first], rows_[last], (int32_t)p_.sinks, tile_) && !cut &&
           !masked_by_row;
  }

  template <int MR>
  SACCADE_NOINLINE void process_strip(int first) {
    const int last = first + MR - 1;  // rows are in the order of positions
    const Columns visible = visible_columns(rows_[first], rows_[last], (int32_t)p_.sinks, tile_);
    if (visible.begin == visible.end) return;
    const bool full = is_full(first, last, visible);
    const int begin = visible.begin / kColumns * kColumns;
    const int end = (int)ceil_div(visible.end, kColumns) * kColumns;
    score<MR>(first, begin, end);
    const Scoring how{!full, p_.alibi != nullptr, p_.softcap * kLog2e, (int32_t)p_.sinks};
    online_softmax<MR>(state_, first, rows_, how,
                       [&](int i) { return positions_of(first + i, i); }, scores_, kScoreStride,
                       begin, end);
    if (values_finite_ || full) {
      accumulate<MR>(first, visible.begin, visible.end);
    } else {
      accumulate_visible<MR>(first, visible.begin, visible.end);
    }
  }

  template <int MR>
  void score(int first, int begin, int end) {
    const int dim = (int)p_.head_dim;
    const float* q = q_ + (int64_t)first * dim;
    for (int c = begin; c < end; c += kColumns) {
      float* s = scores_ + c;
      multiply<MR, kVectors, 1, MR, kColumns>(q, k_panels_ + (int64_t)c * dim, dim, [&](auto& acc) {
        SACCADE_UNROLL for (int i = 0; i < MR; ++i)
          SACCADE_UNROLL for (int n = 0; n < kVectors; ++n)
            store(s + i * kScoreStride + n * W, acc[i][n]);
      });
    }
  }

  // o = o * alpha + P V
  template <int MR>
  void accumulate(int first, int begin, int end) {
    int64_t d = 0;
    for (; d + kColumns - W < p_.value_dim; d += kColumns)
      accumulate_columns<MR, kVectors>(first, begin, end, d);
    if (d < p_.value_dim) accumulate_columns<MR, 1>(first, begin, end, d);
  }

  template <int MR, int NV>
  void accumulate_columns(int first, int begin, int end, int64_t d) {
    float* o = o_ + first * o_stride_ + d;
    const float* alpha = state_.alpha + first;
    const float* v = v_panels_ + d * kTile + begin * kColumns;
    multiply<MR, NV, kScoreStride, 1, kColumns>(scores_ + begin, v, end - begin, [&](auto& acc) {
      SACCADE_UNROLL for (int i = 0; i < MR; ++i) {
        const F rescale = set1(alpha[i]);
        SACCADE_UNROLL for (int n = 0; n < NV; ++n) {
          float* at = o + i * o_stride_ + n * W;
          store(at, fma(load(at), rescale, acc[i][n]));
        }
      }
    });
  }

  // The same where a masked value may be NaN or infinite, of which even 0 times is NaN.
  template <int MR>
  void accumulate_visible(int first, int begin, int end) {
    for (int i = 0; i < MR; ++i) {
      float* o = o_ + (first + i) * o_stride_;
      for (int64_t d = 0; d < p_.value_dim; ++d) o[d] *= state_.alpha[first + i];
      const int32_t* positions = positions_of(first + i, i);
      for (int j = begin; j < end; ++j) {
        if (!is_visible(rows_[first + i], (int32_t)p_.sinks, positions[j])) continue;
        const float weight = scores_[i * kScoreStride + j];
        for (int64_t d = 0; d < p_.value_dim; ++d)
          o[d] += weight * v_panels_[d / kColumns * kColumns * kTile + j * kColumns + d % kColumns];
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
  int num_rows_ = 0;
  int64_t o_stride_ = 0, first_block_ = 0, num_blocks_ = 1;
  bool values_finite_ = true;
  Row* rows_ = nullptr;
  float *q_ = nullptr, *o_ = nullptr, *k_panels_ = nullptr, *v_panels_ = nullptr,
        *scores_ = nullptr;
  Softmax state_{};
  Range* ranges_ = nullptr;
  int32_t *block_positions_ = nullptr, *row_positions_ = nullptr;
  Tile tile_;
};

}  // namespace saccade::SACCADE_TARGET
