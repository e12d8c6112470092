// Gradients in one pass over the scores (FlashAttention-2, arXiv 2307.08691): O(N) memory.
//
// With P = 2^(S - lse) known at once from the forward's lse, and delta = rowsum(dO * O) - dlse,
//
//     dV = P^T dO     dS = P * (dO V^T - delta)     dK = dS^T Q * scale     dQ = dS K * scale
//
// A work item is a chunk of the keys of one (sequence, KV head): it loops over tiles, and for each
// tile the blocks of rows that attend to it.  dK and dV of a tile are complete when the rows are
// done.  dQ is summed over tiles in float32, in a buffer of its own for each chunk, so that threads
// never add to the same number and the result does not depend on their order.
#pragma once
#include <algorithm>

#include "arena.h"
#include "micro_kernel.h"
#include "output.h"
#include "pack.h"
#include "pool.h"
#include "softmax.h"
#include "work_items.h"
#include "workspace.h"

namespace saccade::SACCADE_TARGET {

constexpr int kBackwardRows = 96 / kRows * kRows;

struct BackwardItem {
  int64_t sequence, head, chunk;
  Range keys;
  int64_t cost;
};

class Backward {
 public:
  explicit Backward(const Gradients& g) : g_(g), p_(*g.problem) {}

  void run(const BackwardItem& item) {
    item_ = &item;
    sequence_ = &p_.sequences[item.sequence];
    lay_out();
    const Range keys[1] = {item.keys};
    TileWalk walk(p_, *sequence_, item.head, keys, 1, 0, item.keys.stop - item.keys.start);
    while (walk.next(tile_)) {
      pack_tile();
      process_rows();
      write_tile();
    }
  }

 private:
  void lay_out() {
    k_stride_ = ceil_div(p_.head_dim, kColumns) * kColumns;
    dq_stride_ = ceil_div(p_.head_dim, kDqPad) * kDqPad;
    v_stride_ = ceil_div(p_.value_dim, kColumns) * kColumns;
    Arena measure(nullptr);
    lay_out(measure);
    Arena arena(workspace(WorkspaceSlot::item, (size_t)measure.bytes()));
    lay_out(arena);
  }

  void lay_out(Arena& arena) {
    for (float** x : {&keys_t_, &keys_, &dk_}) *x = arena.take<float>(kTile * k_stride_);
    for (float** x : {&values_t_, &dv_}) *x = arena.take<float>(kTile * v_stride_);
    for (float** x : {&q_strips_, &q_panels_}) *x = arena.take<float>(kBackwardRows * k_stride_);
    for (float** x : {&do_strips_, &do_panels_}) *x = arena.take<float>(kBackwardRows * v_stride_);
    for (float** x : {&weights_, &slopes_, &ds_})
      *x = arena.take<float>(kBackwardRows * kScoreStride);
    rows_ = arena.take<Row>(kBackwardRows);
    dq_ = arena.take<float*>(kBackwardRows);
  }

  void pack_tile() {
    Packer<kColumns> packer(p_, sequence_->batch, item_->head);
    packer.keys(tile_, keys_t_);
    packer.rows(tile_.k, p_.kv.k.dtype, tile_.count, (int)p_.head_dim, keys_, kTile);
    packer.columns(tile_.v, p_.kv.v.dtype, tile_.count, (int)p_.value_dim, values_t_);
    std::memset(dk_, 0, kTile * k_stride_ * sizeof(float));
    std::memset(dv_, 0, kTile * v_stride_ * sizeof(float));
  }

  // The rows that attend to a key of the tile, block by block.
  void process_rows() {
    const Sequence& s = *sequence_;
    int64_t first = 0, last = s.q_len;  // queries
    if (p_.causal) first = max(0, tile_.low - s.q_offset);
    if (p_.window != kUnlimited && tile_.high >= 0 && tile_.low >= p_.sinks)
      last = min(last, tile_.high + p_.window - s.q_offset);
    for (int64_t row = first * p_.group; row < last * p_.group; row += kBackwardRows) {
      num_rows_ = (int)min(kBackwardRows, last * p_.group - row);
      load_rows(row);
      for (int i = 0; i < padded_rows(); i += kRows) differentiate_strip(i);
      for (int64_t d = 0; d < p_.value_dim; d += kColumns)
        add_to_keys(weights_, do_panels_ + d * kBackwardRows, dv_ + d, v_stride_);
      for (int64_t d = 0; d < p_.head_dim; d += kColumns)
        add_to_keys(ds_, q_panels_ + d * kBackwardRows, dk_ + d, k_stride_);
    }
  }

  int padded_rows() const { return (int)ceil_div(num_rows_, kRows) * kRows; }

  void load_rows(int64_t begin) {
    const float factor = query_factor(p_);
    for (int i = 0; i < padded_rows(); ++i) {
      const bool real = i < num_rows_;
      const Row row = make_row(p_, *sequence_, item_->head, begin + (real ? i : num_rows_ - 1));
      rows_[i] = row;
      const int64_t of = sequence_->batch * g_.row_batch + row.head * g_.row_head +
                         sequence_->q_begin + row.query;
      const float lse = g_.lse[of];
      lse_[i] = !real || lse == -kInf ? kInf : lse * kLog2e;  // 2^(s - inf) = 0: no key counts
      delta_[i] = g_.delta[of];
      dq_[i] = real ? g_.dq + item_->chunk * g_.dq_chunk + of * dq_stride_ : nullptr;
      place_row(p_.q, row, (int)p_.head_dim, i, factor, q_strips_, p_.scale, q_panels_);
      place_row(g_.d_out, row, (int)p_.value_dim, i, 1.f, do_strips_, 1.f, do_panels_);
    }
  }

  // A row in both forms: times `a` in a strip [dim][kRows], times `b` in panels [rows][kColumns].
  void place_row(const Strided& tensor, const Row& row, int dim, int i, float a, float* strips,
                 float b, float* panels) {
    alignas(64) float x[kDimPad];
    widen_row(tensor.dtype, row_data(tensor, *sequence_, row), dim, 1.f, x);
    float* strip = strips + (int64_t)(i / kRows) * kRows * dim + i % kRows;
    for (int d = 0; d < dim; ++d) strip[(int64_t)d * kRows] = x[d] * a;
    for (int d = 0; d < dim; d += W)
      store(panels + (int64_t)(d / kColumns) * kColumns * kBackwardRows + i * kColumns +
                d % kColumns,
            mul(load(x + d), set1(b)));
  }

  void find_columns(int first) {
    const Row &low = rows_[first], &high = rows_[first + kRows - 1];
    const Columns visible = visible_columns(low, high, (int32_t)p_.sinks, tile_);
    begin_ = visible.begin / kColumns * kColumns;
    end_ = (int)ceil_div(visible.end, kColumns) * kColumns;
    masked_ = end_ > tile_.count || tile_.holes ||
              !all_visible(low, high, (int32_t)p_.sinks, tile_);
  }

  SACCADE_NOINLINE void differentiate_strip(int first) {
    find_columns(first);
    for (int i = first; i < first + kRows; ++i) {  // masked columns have weight 0
      float *weight = weights_ + i * kScoreStride, *ds = ds_ + i * kScoreStride;
      for (int c = 0; c < kTile; c += W)
        if (c < begin_ || c >= end_) {
          store(weight + c, zero());
          store(ds + c, zero());
        }
    }
    if (begin_ >= end_) return;
    for (int c = begin_; c < end_; c += kColumns) compute_probabilities(first, c);
    for (int c = begin_; c < end_; c += kColumns) differentiate(first, c);
    for (int64_t d = 0; d < p_.head_dim; d += kColumns) add_to_queries(first, d);
  }

  // P = 2^(S - lse) of one register block.
  void compute_probabilities(int first, int c) {
    const int dim = (int)p_.head_dim;
    const bool plain = !masked_ && !p_.alibi && p_.softcap == 0.f;
    float* out = weights_ + first * kScoreStride + c;
    multiply<kRows, kVectors, 1, kRows, kColumns>(
        q_strips_ + (int64_t)first * dim, keys_t_ + (int64_t)c * dim, dim, [&](auto& acc) {
          SACCADE_UNROLL for (int i = 0; i < kRows; ++i) {
            const F lse = set1(lse_[first + i]);
            SACCADE_UNROLL for (int n = 0; n < kVectors; ++n) {
              F x = acc[i][n];
              if (plain) x = exp2_negative(sub(x, lse));
              store(out + i * kScoreStride + n * W, x);
            }
          }
        });
    if (!plain)
      for (int i = 0; i < kRows; ++i) compute_probabilities_of_row(first + i, c);
  }

  void compute_probabilities_of_row(int row, int c) {
    const Scoring how{masked_, p_.alibi != nullptr, p_.softcap * kLog2e, (int32_t)p_.sinks};
    float *x = weights_ + row * kScoreStride, *slope = slopes_ + row * kScoreStride;
    if (p_.softcap != 0.f)
      for (int j = c; j < c + kColumns; j += W) {
        const F t = tanh(load(x + j));
        store(slope + j, sub(set1(1.f), mul(t, t)));
      }
    adjust_row(how, rows_[row], tile_.positions, x, c, c + kColumns);
    for (int j = c; j < c + kColumns; j += W)
      store(x + j, exp2_negative(sub(load(x + j), set1(lse_[row]))));
  }

  // dS = P * (dO V^T - delta) of one register block.
  void differentiate(int first, int c) {
    const int dim = (int)p_.value_dim;
    const float* weights = weights_ + first * kScoreStride + c;
    float* out = ds_ + first * kScoreStride + c;
    multiply<kRows, kVectors, 1, kRows, kColumns>(
        do_strips_ + (int64_t)first * dim, values_t_ + (int64_t)c * dim, dim, [&](auto& acc) {
          SACCADE_UNROLL for (int i = 0; i < kRows; ++i) {
            const F delta = set1(delta_[first + i]);
            SACCADE_UNROLL for (int n = 0; n < kVectors; ++n) {
              const int at = i * kScoreStride + n * W;
              store(out + at, mul(load(weights + at), sub(acc[i][n], delta)));
            }
          }
        });
    if (p_.softcap == 0.f) return;
    for (int i = first; i < first + kRows; ++i)
      for (int j = c; j < c + kColumns; j += W) {
        float* x = ds_ + i * kScoreStride + j;
        store(x, mul(load(x), load(slopes_ + i * kScoreStride + j)));
      }
  }

  // dQ += dS K for one strip; the caller multiplies by the scale at the end.
  void add_to_queries(int first, int64_t d) {
    float* const* dq = dq_ + first;
    multiply<kRows, kVectors, kScoreStride, 1, kColumns>(
        ds_ + first * kScoreStride + begin_, keys_ + d * kTile + begin_ * kColumns, end_ - begin_,
        [&](auto& acc) {
          SACCADE_UNROLL for (int i = 0; i < kRows; ++i) {
            if (!dq[i]) continue;
            SACCADE_UNROLL for (int n = 0; n < kVectors; ++n) {
              float* at = dq[i] + d + n * W;
              store(at, add(load(at), acc[i][n]));
            }
          }
        });
  }

  // out[key] += sum over rows of x[row][key] * panel[row], kRows keys at a time.
  SACCADE_NOINLINE void add_to_keys(const float* x, const float* panel, float* out,
                                    int64_t stride) {
    const int rows = padded_rows();
    for (int j = 0; j < tile_.count; j += kRows) {
      int32_t low = kNoKey;  // holes may lie anywhere in the tile
      for (int i = j; i < j + kRows && i < tile_.count; ++i)
        low = tile_.positions[i] < low ? tile_.positions[i] : low;
      int row = 0;  // the first row that attends to a key of this block
      while (row < rows && rows_[row].last < low) ++row;
      if (row == rows) continue;
      multiply<kRows, kVectors, 1, kScoreStride, kColumns>(
          x + j + row * kScoreStride, panel + row * kColumns, rows - row, [&](auto& acc) {
            SACCADE_UNROLL for (int i = 0; i < kRows; ++i) {
              if (j + i >= kTile) break;
              SACCADE_UNROLL for (int n = 0; n < kVectors; ++n) {
                float* at = out + (j + i) * stride + n * W;
                store(at, add(load(at), acc[i][n]));
              }
            }
          });
    }
  }

  void write_tile() {
    for (int j = 0; j < tile_.count; ++j) {
      if (tile_.positions[j] == kNoKey) continue;
      const int64_t slot = sequence_->k_begin + tile_.positions[j];
      write(g_.dk, slot, dk_ + j * k_stride_, (int)p_.head_dim);
      write(g_.dv, slot, dv_ + j * v_stride_, (int)p_.value_dim);
    }
  }

  void write(const Strided& x, int64_t slot, const float* row, int dim) {
    char* out = x.data + sequence_->batch * x.batch + item_->head * x.head + slot * x.row;
    store_row(x.dtype, out, row, 1.f, dim);
  }

  const Gradients& g_;
  const Problem& p_;
  const BackwardItem* item_ = nullptr;
  const Sequence* sequence_ = nullptr;
  int64_t k_stride_ = 0, v_stride_ = 0, dq_stride_ = 0;
  int num_rows_ = 0, begin_ = 0, end_ = 0;
  bool masked_ = false;
  float *keys_t_ = nullptr, *keys_ = nullptr, *values_t_ = nullptr, *dk_ = nullptr, *dv_ = nullptr;
  float *q_strips_ = nullptr, *q_panels_ = nullptr, *do_strips_ = nullptr, *do_panels_ = nullptr;
  float *weights_ = nullptr, *slopes_ = nullptr, *ds_ = nullptr;
  Row* rows_ = nullptr;
  float** dq_ = nullptr;
  float lse_[kBackwardRows], delta_[kBackwardRows];
  Tile tile_;
};

struct BackwardWork {
  const Gradients* gradients;
  const BackwardItem* items;
};

static void run_backward_item(void* context, int64_t i) {
  const BackwardWork& work = *(const BackwardWork*)context;
  Backward(*work.gradients).run(work.items[i]);
}

// All items with at least one key; returns their number.
static int64_t list_backward_items(const Gradients& g, BackwardItem* items) {
  const Problem& p = *g.problem;
  int64_t n = 0;
  for (int64_t s = 0; s < p.num_sequences; ++s)
    for (int64_t head = 0; head < p.kv_heads; ++head)
      for (int64_t chunk = 0; chunk < g.num_chunks; ++chunk) {
        const Sequence& sequence = p.sequences[s];
        const Range keys = split_range(sequence.k_len, chunk, g.num_chunks);
        const int64_t masked = p.causal ? max(0, keys.start - sequence.q_offset) : 0;  // queries
        const int64_t cost = (keys.stop - keys.start) * max(0, sequence.q_len - masked);
        if (keys.stop > keys.start) items[n++] = {s, head, chunk, keys, cost};
      }
  return n;
}

static void attend_backward(const Gradients& g) {
  const Problem& p = *g.problem;
  const int64_t most = p.num_sequences * p.kv_heads * g.num_chunks;
  auto* items = (BackwardItem*)workspace(WorkspaceSlot::call, most * sizeof(BackwardItem));
  const int64_t n = list_backward_items(g, items);
  std::stable_sort(items, items + n, [](const BackwardItem& a, const BackwardItem& b) {
    return a.cost > b.cost;
  });
  BackwardWork work{&g, items};
  parallel_for(p.threads, n, run_backward_item, &work);
}

}  // namespace saccade::SACCADE_TARGET
