// Many queries: strips of rows against packed tiles of keys, everything float32 in cache.
//
// A work item loops over the tiles of keys that its rows attend to.  A tile is packed once; then every
// strip of MR rows computes its scores (QK^T), takes the online-softmax step while they are still
// in L1, and adds P V to its accumulators.  Strips for which the full tile is masked skip it, and
// strips that attend to all of it skip the mask.
#pragma once
#include "micro_kernel.h"
#include "prefill_rows.h"

namespace saccade::SACCADE_TARGET {

class Prefill : public PrefillRows<Prefill> {
 public:
  using PrefillRows::PrefillRows;

 private:
  friend PrefillRows<Prefill>;

  void lay_out(Arena& arena) {
    const int64_t dim = p_.head_dim;
    lay_out_rows(arena, kRows);
    q_ = arena.take<float>(padded_rows_ * dim);
    k_panels_ = arena.take<float>(kTile * dim);
    v_panels_ = arena.take<float>(kTile * o_stride_);
  }

  template <class Visit>
  void each_strip(Visit&& visit) {
    strips_of_rows(num_rows_, visit);
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

  void pack_tile() {
    Packer<kColumns> packer(p_, sequence_->batch, item_->head);
    packer.keys(tile_, k_panels_);
    values_finite_ = packer.values(tile_, v_panels_);
  }

  template <int MR>
  SACCADE_NOINLINE void process_strip(int first) {
    const Part part = part_of(first, first + MR - 1);
    if (part.visible.begin == part.visible.end) return;
    score<MR>(first, part.begin, part.end);
    online_softmax<MR>(state_, first, rows_, scoring(part, 1.f),
                       [&](int i) { return positions_of(first + i, i); }, scores_, kScoreStride,
                       part.begin, part.end);
    keep_weights<MR>(first, part.begin, part.end);
    if (values_finite_ || part.full) return accumulate<MR>(first, part.visible);
    accumulate_visible<MR>(
        first, part.visible, [&](int i, int j) { return scores_[i * kScoreStride + j]; },
        [&](int j, int64_t d) {
          return v_panels_[d / kColumns * kColumns * kTile + j * kColumns + d % kColumns];
        });
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
  void accumulate(int first, Columns columns) {
    int64_t d = 0;
    for (; d + kColumns - W < p_.value_dim; d += kColumns)
      accumulate_columns<MR, kVectors>(first, columns, d);
    if (d < p_.value_dim) accumulate_columns<MR, 1>(first, columns, d);
  }

  template <int MR, int NV>
  void accumulate_columns(int first, Columns columns, int64_t d) {
    float* o = o_ + first * o_stride_ + d;
    const float* alpha = state_.alpha + first;
    const float* v = v_panels_ + d * kTile + columns.begin * kColumns;
    multiply<MR, NV, kScoreStride, 1, kColumns>(
        scores_ + columns.begin, v, columns.end - columns.begin, [&](auto& acc) {
          SACCADE_UNROLL for (int i = 0; i < MR; ++i) {
            const F rescale = set1(alpha[i]);
            SACCADE_UNROLL for (int n = 0; n < NV; ++n) {
              float* at = o + i * o_stride_ + n * W;
              store(at, fma(load(at), rescale, acc[i][n]));
            }
          }
        });
  }

  float *q_ = nullptr, *k_panels_ = nullptr, *v_panels_ = nullptr;
};

}  // namespace saccade::SACCADE_TARGET
