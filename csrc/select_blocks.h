// Selects blocks of keys by their summaries: one small product a block, then a partial sort.
//
// A block of queries is represented by the sum of its queries over the heads that share a KV head.
// The bound of Quest (arXiv 2406.10774), sum_d max(q_d low_d, q_d high_d), is a product too: of
// (max(q, 0), min(q, 0)) with (high, low), so sums of queries bound sums of scores.
// Keys themselves are scored by every query, and blocks by the sum of their softmax weights.
#pragma once
#include <algorithm>

#include "arena.h"
#include "intmath.h"
#include "loaders.h"
#include "pool.h"
#include "selection.h"
#include "weigh_keys.h"
#include "workspace.h"

namespace saccade::SACCADE_TARGET {

class BlockSelector {
 public:
  BlockSelector(const Selecting& s, int64_t item) : s_(s), group_(s.heads / s.kv_heads) {
    const int64_t q_blocks = ceil_div(s.q_len, s.rule.q_block);
    batch_ = item / q_blocks / s.kv_heads;
    head_ = item / q_blocks % s.kv_heads;
    begin_ = item % q_blocks * s.rule.q_block;
    end_ = min(begin_ + s.rule.q_block, s.q_len);
    exact_ = s.rule.summary == Summary::keys;
    width_ = s.rule.summary == Summary::bounds ? 2 * s.head_dim : s.head_dim;
    vectors_ = s.rule.share > 0.f ? group_ : 1;
    if (exact_) {
      width_ = ceil_div(s.head_dim, W) * W;
      vectors_ = group_ * (end_ - begin_);
    }
    out_ = s.out + item * s.num_blocks;
  }

  static int64_t workspace_bytes(const Selecting& s) {
    BlockSelector selector(s, 0);
    Arena measure(nullptr);
    selector.lay_out(measure);
    return measure.bytes();
  }

  void run() {
    Arena arena(workspace(WorkspaceSlot::item, (size_t)workspace_bytes(s_)));
    lay_out(arena);
    list_others();
    if (others_ == 0) return;
    const BlockRule& rule = s_.rule;
    if (rule.top >= others_ || rule.share >= 1.f) {
      for (int64_t i = 0; i < others_; ++i) out_[order_[i]] = 1;
    } else if (exact_) {
      if (rule.top == 0) return;
      weigh_blocks();
      choose_top();
    } else if (rule.top > 0 || rule.share > 0.f) {
      pool_queries();
      for (int64_t v = 0; v < vectors_; ++v) score(pooled_ + v * width_, scores_ + v * others_);
      if (rule.share > 0.f)
        choose_share();
      else
        choose_top();
    }
  }

 private:
  void lay_out(Arena& arena) {
    pooled_ = arena.take<float>(vectors_ * width_ + W);
    scores_ = arena.take<float>((exact_ ? 1 : vectors_) * s_.num_blocks + W);
    if (exact_) {
      of_keys_ = arena.take<float>(s_.rule.k_block + W);
      weighed_ = arena.take<Weighed>(vectors_ * s_.num_blocks);
    }
    order_ = arena.take<int32_t>(s_.num_blocks);
    rank_ = arena.take<int32_t>(s_.num_blocks);
  }

  // Marks what is always read, and lists what else the last query of the block may see.
  void list_others() {
    const BlockRule& rule = s_.rule;
    std::memset(out_, 0, (size_t)s_.num_blocks);
    const int64_t last = min((s_.q_offset + end_ - 1) / rule.k_block, s_.num_blocks - 1);
    const int64_t own = (s_.q_offset + begin_) / rule.k_block;
    const bool choosing = rule.summary != Summary::none;
    for (int64_t b = 0; b <= last; ++b) {
      const bool always = b < rule.sinks || b > own - rule.window ||
                          (rule.stride > 0 && b % rule.stride == 0) ||
                          (choosing && !exact_ && b >= s_.num_rows);
      out_[b] = always;
      if (!always && choosing) order_[others_++] = (int32_t)b;
    }
  }

  // Scores of the others: the sums of the softmax weights of their keys, over queries and heads.
  void weigh_blocks() {
    const int64_t stop = min(s_.q_offset + end_, s_.num_rows), size = s_.rule.k_block;
    const int64_t blocks = ceil_div(stop, size);
    const char* keys = s_.rows.data + batch_ * s_.rows.batch + head_ * s_.rows.head;
    std::memset(pooled_, 0, sizeof(float) * (size_t)(vectors_ * width_));
    for (int64_t v = 0; v < vectors_; ++v) read_query(v, pooled_ + v * width_);
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t v = 0; v < vectors_; ++v) {
        const int64_t seen = s_.q_offset + begin_ + v % (end_ - begin_) + 1;
        const int64_t count = min(min(seen, stop), (b + 1) * size) - b * size;
        Weighed& found = weighed_[v * blocks + b] = Weighed{};
        if (count <= 0) continue;
        score(pooled_ + v * width_, keys + b * size * s_.rows.row, (int)count);
        found = saccade::SACCADE_TARGET::weigh(of_keys_, (int)count);
      }
    std::memset(scores_, 0, sizeof(float) * (size_t)blocks);
    for (int64_t v = 0; v < vectors_; ++v) add_shares(weighed_ + v * blocks, blocks, scores_);
    for (int64_t i = 0; i < others_; ++i) scores_[i] = bounded(scores_[order_[i]]);
  }

  // Query v of the group, the queries of a head one after the other, in units of log2.
  void read_query(int64_t v, float* to) const {
    const int64_t count = end_ - begin_;
    const char* q = s_.q.data + batch_ * s_.q.batch + (head_ * group_ + v / count) * s_.q.head +
                    (begin_ + v % count) * s_.q.row;
    const F factor = set1(s_.rule.scale * kLog2e);
    each_part(s_.head_dim, [&](int64_t d, int n) {
      F x;
      switch (s_.q.dtype) {
        case Dtype::f32: get_part<Plain<float>>((const float*)q + d, n, &x); break;
        case Dtype::bf16: get_part<Plain<Bf16>>((const Bf16*)q + d, n, &x); break;
        default: get_part<Plain<F16>>((const F16*)q + d, n, &x);
      }
      put(to + d, mul(x, factor), n);
    });
  }

  void score(const float* q, const char* keys, int count) {
    const int dim = (int)s_.head_dim;
    switch (s_.rows.dtype) {
      case Dtype::f32: return score_keys<float>(q, keys, s_.rows.row, count, dim, of_keys_);
      case Dtype::bf16: return score_keys<Bf16>(q, keys, s_.rows.row, count, dim, of_keys_);
      default: return score_keys<F16>(q, keys, s_.rows.row, count, dim, of_keys_);
    }
  }

  void pool_queries() {
    std::memset(pooled_, 0, sizeof(float) * (size_t)(vectors_ * width_));
    for (int64_t h = 0; h < group_; ++h)
      for (int64_t i = begin_; i < end_; ++i) {
        const char* q = s_.q.data + batch_ * s_.q.batch + (head_ * group_ + h) * s_.q.head +
                        i * s_.q.row;
        float* sum = pooled_ + (vectors_ > 1 ? h : 0) * width_;
        switch (s_.q.dtype) {
          case Dtype::f32: add_query((const float*)q, sum); break;
          case Dtype::bf16: add_query((const Bf16*)q, sum); break;
          default: add_query((const F16*)q, sum);
        }
      }
    if (s_.rule.share == 0.f) return;
    const F factor = set1(s_.rule.scale * kLog2e / (float)(end_ - begin_));
    each_part(vectors_ * width_, [&](int64_t d, int n) {
      put(pooled_ + d, mul(load_part(pooled_ + d, n), factor), n);
    });
  }

  template <class T>
  void add_query(const T* q, float* sum) {
    const int64_t dim = s_.head_dim;
    each_part(dim, [&](int64_t d, int n) {
      const F x = n == W ? load(q + d) : load_part(q + d, n);
      if (s_.rule.summary == Summary::mean) return put(sum + d, add(load_part(sum + d, n), x), n);
      const F above = max(x, zero());
      put(sum + d, add(load_part(sum + d, n), above), n);
      put(sum + dim + d, add(load_part(sum + dim + d, n), sub(x, above)), n);
    });
  }

  template <class Visit>
  static void each_part(int64_t length, Visit&& visit) {
    for (int64_t d = 0; d < length; d += W) visit(d, (int)min(W, length - d));
  }

  static void put(float* x, F values, int n) {
    if (n == W) return store(x, values);
    store_part(x, values, n);
  }

  void score(const float* pooled, float* scores) {
    switch (s_.rows.dtype) {
      case Dtype::f32: return score_rows<float>(pooled, scores);
      case Dtype::bf16: return score_rows<Bf16>(pooled, scores);
      default: return score_rows<F16>(pooled, scores);
    }
  }

  // Products of a pooled vector with the rows, four at a time.
  template <class T>
  SACCADE_NOINLINE void score_rows(const float* pooled, float* scores) {
    const char* first = s_.rows.data + batch_ * s_.rows.batch + head_ * s_.rows.head;
    constexpr int kAtOnce = 4;
    for (int64_t i = 0; i < others_; i += kAtOnce) {
      const T* row[kAtOnce];
      F sum[kAtOnce];
      for (int j = 0; j < kAtOnce; ++j) {
        row[j] = (const T*)(first + order_[min(i + j, others_ - 1)] * s_.rows.row);
        sum[j] = zero();
      }
      int64_t d = 0;
      for (; d + W <= width_; d += W) {
        const F x = load(pooled + d);
        for (int j = 0; j < kAtOnce; ++j) sum[j] = fma(x, load(row[j] + d), sum[j]);
      }
      if (d < width_) {
        const int n = (int)(width_ - d);
        const F x = load_part(pooled + d, n);
        for (int j = 0; j < kAtOnce; ++j) sum[j] = fma(x, load_part(row[j] + d, n), sum[j]);
      }
      for (int64_t j = 0; j < min(kAtOnce, others_ - i); ++j) scores[i + j] = bounded(hsum(sum[j]));
    }
  }

  // NaN, which orders nothing, as the lowest score.
  static float bounded(float x) {
    constexpr float kMost = 3e38f;
    return x < kMost ? (x > -kMost ? x : -kMost) : (x != x ? -kMost : kMost);
  }

  // Blocks by score, the first of equal ones first.
  auto higher() const {
    return [scores = scores_](int32_t a, int32_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    };
  }

  // Marks the blocks with the highest scores, the first of equal ones.
  void choose_top() {
    for (int64_t i = 0; i < others_; ++i) rank_[i] = ordered(scores_[i]);
    const int32_t least = least_of_top();
    int64_t left = s_.rule.top;
    for (int64_t i = 0; i < others_; ++i) left -= out_[order_[i]] = rank_[i] > least;
    for (int64_t i = 0; i < others_ && left > 0; ++i)
      if (rank_[i] == least) out_[order_[i]] = 1, --left;
  }

  // An integer in the order of a float.
  static int32_t ordered(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits < 0 ? bits ^ INT32_MAX : bits;
  }

  // The largest number that at least `top` ranks reach: bit by bit, since counting has no branches.
  int32_t least_of_top() const {
    uint32_t found = 0;  // of numbers shifted to start at 0
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
      const int32_t at = (int32_t)((found | bit) ^ (1u << 31));
      int32_t count = 0;
      for (int64_t i = 0; i < others_; ++i) count += rank_[i] >= at;
      if (count >= s_.rule.top) found |= bit;
    }
    return (int32_t)(found ^ (1u << 31));
  }

  // The fewest blocks that hold the share of the estimated attention, a mean over the heads.
  void choose_share() {
    for (int64_t v = 0; v < vectors_; ++v) {
      const float sum = weigh(scores_ + v * others_);
      for (int64_t i = 0; i < others_; ++i) {
        const float weight = scores_[v * others_ + i] / sum;
        scores_[i] = v == 0 ? weight : scores_[i] + weight;
      }
    }
    for (int64_t i = 0; i < others_; ++i) rank_[i] = (int32_t)i;
    std::sort(rank_, rank_ + others_, higher());
    float held = 0.f;
    for (int64_t i = 0; i < others_ && held < s_.rule.share * (float)vectors_; ++i) {
      out_[order_[rank_[i]]] = 1;
      held += scores_[rank_[i]];
    }
  }

  // Scores become weights; returns their sum.
  float weigh(float* x) {
    F sum = zero();
    float peak = x[0];
    for (int64_t i = 1; i < others_; ++i) peak = x[i] > peak ? x[i] : peak;
    each_part(others_, [&](int64_t i, int n) {
      const F weight = exp2_negative(sub(load_part(x + i, n), set1(peak)));
      put(x + i, weight, n);
      sum = add(sum, n == W ? weight : load_part(x + i, n));
    });
    return hsum(sum);
  }

  const Selecting& s_;
  const int64_t group_;
  int64_t batch_, head_, begin_, end_, width_, vectors_, others_ = 0;
  uint8_t* out_;
  bool exact_;
  float *pooled_ = nullptr, *scores_ = nullptr, *of_keys_ = nullptr;
  Weighed* weighed_ = nullptr;
  int32_t *order_ = nullptr, *rank_ = nullptr;
};

static void select_blocks(const Selecting& s) {
  const int64_t items = s.batch * s.kv_heads * ceil_div(s.q_len, s.rule.q_block);
  parallel_for(s.threads, items,
               [](void* context, int64_t i) { BlockSelector(*(const Selecting*)context, i).run(); },
               const_cast<Selecting*>(&s));
}

}  // namespace saccade::SACCADE_TARGET
