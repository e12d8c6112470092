// Many queries: strips of rows against packed tiles of keys, everything float32 in cache.
//
// For a block of rows that share a KV head, walk the tiles of keys it can see.  A tile is packed
// once; then every strip of MR rows computes its scores (QK^T), takes the online-softmax step while
// they are still in L1, and adds P V to its accumulators.  Strips that see nothing of a tile skip
// it, and strips that see all of it skip the mask.
#pragma once
#include "finish.h"
#include "micro_kernel.h"
#include "pack.h"
#include "plan.h"
#include "softmax.h"

namespace saccade::SACCADE_TARGET {

// Cuts a thread's workspace into aligned arrays; with no memory it only measures.
class Carver {
 public:
  explicit Carver(void* memory) : base_((char*)memory) {}
  template <class T>
  T* take(int64_t n) {
    T* p = base_ ? (T*)(base_ + used_) : nullptr;
    used_ += (n * (int64_t)sizeof(T) + 63) / 64 * 64 + 64;
    return p;
  }
  size_t used() const { return (size_t)used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

class Prefill {
 public:
  Prefill(const Problem& p, const Partials& partials) : p_(p), partials_(partials) {}

  void run(const Piece& piece) {
    const Sequence& s = p_.sequences[piece.sequence];
    piece_ = &piece;
    sequence_ = &s;
    num_rows_ = (int)(piece.row_end - piece.row_begin);
    carve();
    describe_rows();
    pack_queries();
    start_state();
    const int64_t num_ranges = visited_ranges(p_, s, piece, ranges_);
    const Range part = split_part(total_keys(ranges_, num_ranges), piece.split, piece.splits);
    KeyWalk walk(p_, s, piece.head, ranges_, num_ranges, part.start, part.stop - part.start);
    Packer<kColumns> packer(p_, s.batch, piece.head);
    while (walk.next(tile_)) {
      packer.keys(tile_, k_panels_);
      values_finite_ = packer.values(tile_, v_panels_);
      mark_blocks();
      absorb_tile();
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

  void carve() {
    for (int pass = 0; pass < 2; ++pass) {
      Carver all(pass ? scratch(Scratch::kernel, bytes_) : nullptr);
      const int64_t rows = num_rows_ + kRows, dim = p_.head_dim;
      o_stride_ = ceil_div(p_.value_dim, kColumns) * kColumns;
      rows_ = all.take<Row>(rows);
      q_ = all.take<float>(rows * dim);
      o_ = all.take<float>(rows * o_stride_);
      state_ = {all.take<float>(rows + W), all.take<float>(rows + W), all.take<float>(rows * W)};
      k_panels_ = all.take<float>(kTile * dim);
      v_panels_ = all.take<float>(kTile * o_stride_);
      scores_ = all.take<float>(kRows * kScoreStride);
      ranges_ = all.take<Range>(max_ranges(p_, *sequence_));
      first_block_ = p_.blocks.data ? piece_->row_begin / p_.group / p_.q_block : 0;
      num_blocks_ = p_.blocks.data
                        ? (piece_->row_end - 1) / p_.group / p_.q_block - first_block_ + 1 : 1;
      block_positions_ = all.take<int32_t>(num_blocks_ * kTile);
      row_positions_ = all.take<int32_t>(kRows * kTile);
      bytes_ = all.used();
    }
  }

  void describe_rows() {
    const Sequence& s = *sequence_;
    for (int i = 0; i < num_rows_ + kRows; ++i) {  // rows past the end repeat the last one
      const int64_t row = least(piece_->row_begin + i, piece_->row_end - 1);
      const int64_t query = row / p_.group, head = piece_->head * p_.group + row % p_.group;
      const int64_t position = s.q_offset + query;
      const bool windowed = p_.window != kUnlimited;
      rows_[i] = {(int32_t)position, p_.causal ? (int32_t)position : kEverywhere,
                  windowed ? (int32_t)most(position - p_.window, INT32_MIN) : INT32_MIN,
                  p_.alibi ? p_.alibi[s.batch * p_.alibi_batch + head] * kLog2e : 0.f, query, head};
    }
  }

  // Strips [head_dim][MR], multiplied by scale * log2(e) (or scale / softcap).
  void pack_queries() {
    const float factor = p_.softcap != 0.f ? p_.scale / p_.softcap : p_.scale * kLog2e;
    each_strip([&]<int MR>(int first) {
      for (int i = 0; i < MR; ++i) pack_query(first + i, q_ + first * p_.head_dim + i, MR, factor);
    });
  }

  void pack_query(int row, float* out, int stride, float factor) {
    const int dim = (int)p_.head_dim;
    alignas(64) float x[kDimPad];
    const char* q = p_.q.data + sequence_->batch * p_.q.batch + rows_[row].head * p_.q.head +
                    (sequence_->q_begin + rows_[row].query) * p_.q.row;
    switch (p_.q.dtype) {
      case Dtype::f32: widen((const float*)q, dim, factor, x); break;
      case Dtype::bf16: widen((const Bf16*)q, dim, factor, x); break;
      default: widen((const F16*)q, dim, factor, x);
    }
    for (int d = 0; d < dim; ++d) out[(int64_t)d * stride] = x[d];
  }

  void start_state() {
    std::memset(o_, 0, (num_rows_ + kRows) * o_stride_ * sizeof(float));
    std::memset(state_.l, 0, (num_rows_ + kRows) * W * sizeof(float));
    const bool sinks = p_.sink_logits && piece_->split == 0;
    for (int i = 0; i < num_rows_ + kRows; ++i) {  // a learned sink is a first score without a value
      state_.m[i] = sinks ? p_.sink_logits[rows_[i].head] * kLog2e : -kInf;
      if (sinks && state_.m[i] != -kInf) state_.l[i * W] = 1.f;
    }
  }

  // Positions as the queries of each selected block see them.
  void mark_blocks() {
    if (!p_.blocks.data || num_blocks_ == 1) return;
    for (int64_t b = 0; b < num_blocks_; ++b) {
      for (int j = 0; j < kTile; ++j) {
        const int32_t at = tile_.positions[j];
        const bool seen = j < tile_.count && at != kNowhere &&
                          block_allowed(p_, sequence_->batch, piece_->head, first_block_ + b,
                                        at / p_.k_block);
        block_positions_[b * kTile + j] = seen ? at : kNowhere;
      }
    }
  }

  // The key positions of the tile as one row sees them.
  const int32_t* positions_of(int row, int slot) {
    const int32_t* base = tile_.positions;
    if (p_.blocks.data && num_blocks_ > 1)
      base = block_positions_ + (rows_[row].query / p_.q_block - first_block_) * kTile;
    if (!p_.attn_mask.data) return base;
    const ByteGrid& g = p_.attn_mask;
    const uint8_t* seen = g.data + sequence_->batch * g.batch + rows_[row].head * g.head +
                          rows_[row].query * g.row;
    int32_t* out = row_positions_ + slot * kTile;
    for (int j = 0; j < kTile; ++j) {
      const bool real = j < tile_.count && base[j] != kNowhere;
      out[j] = real && seen[base[j] * g.column] ? base[j] : kNowhere;
    }
    return out;
  }

  void absorb_tile() {
    each_strip([&]<int MR>(int first) { absorb_strip<MR>(first); });
  }

  // Tile columns that some row of a strip sees.
  struct Columns {
    int begin, end;
    bool full;  // every row sees every one of them
  };

  Columns columns_of(int first, int last) const {
    const Row &low = rows_[first], &high = rows_[last];  // rows are in the order of positions
    int begin = 0, end = tile_.count;
    const int32_t sinks = (int32_t)p_.sinks;
    auto in_reach = [&](int32_t at) { return at <= high.last && (at > low.after || at < sinks); };
    while (end > begin && !in_reach(tile_.positions[end - 1])) --end;
    while (begin < end && !in_reach(tile_.positions[begin])) ++begin;
    const bool cut = ceil_div(end, kColumns) * kColumns > tile_.count || tile_.holes;
    const bool rows_agree = tile_.high <= low.last && (tile_.low > high.after || tile_.high < sinks);
    const bool by_row = p_.attn_mask.data || (p_.blocks.data && num_blocks_ > 1);
    return {begin, end, rows_agree && !cut && !by_row};
  }

  template <int MR>
  SACCADE_NOINLINE void absorb_strip(int first) {
    const Columns seen = columns_of(first, first + MR - 1);
    if (seen.begin == seen.end) return;
    const int begin = seen.begin / kColumns * kColumns;
    const int end = (int)ceil_div(seen.end, kColumns) * kColumns;
    score<MR>(first, begin, end);
    const Scoring how{!seen.full, p_.alibi != nullptr, p_.softcap * kLog2e, (int32_t)p_.sinks};
    online_softmax<MR>(state_, first, rows_, how,
                       [&](int i) { return positions_of(first + i, i); }, scores_, kScoreStride,
                       begin, end);
    if (values_finite_ || seen.full) {
      accumulate<MR>(first, seen.begin, seen.end);
    } else {
      accumulate_visible<MR>(first, seen.begin, seen.end);
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
        const F shrink = set1(alpha[i]);
        SACCADE_UNROLL for (int n = 0; n < NV; ++n) {
          float* at = o + i * o_stride_ + n * W;
          store(at, fma(load(at), shrink, acc[i][n]));
        }
      }
    });
  }

  // The same when an unseen value may be NaN or infinite: 0 times that would not be nothing.
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
    for (int i = 0; i < num_rows_; ++i) {
      const float l = hsum(load(state_.l + i * W));
      if (piece_->splits == 1) {
        write_row(p_, *sequence_, rows_[i].query, rows_[i].head, o_ + i * o_stride_, state_.m[i], l);
        continue;
      }
      const int64_t at = piece_->first_partial + i;
      partials_.m[at] = state_.m[i];
      partials_.l[at] = l;
      std::memcpy(partials_.o + at * p_.value_dim, o_ + i * o_stride_,
                  p_.value_dim * sizeof(float));
    }
  }

  const Problem& p_;
  const Partials& partials_;
  const Piece* piece_ = nullptr;
  const Sequence* sequence_ = nullptr;
  size_t bytes_ = 0;
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
