// What keys receive: the weights of all rows on each key of a KV head, summed or the largest.
//
// A row divides its weights by the sum of all of them, which is known behind its last tile.  So an
// item keeps what the softmax of each strip gave, 2^(score - m) with the maximum m of that time,
// and multiplies it by 2^(m - lse) at the end: one multiply-add for each pair of a row and a key,
// where computing the scores again would take as many as a head has channels.
//
// Items of the same KV head add to the same keys.  They do so in integers, whose sum is the same in
// any order, so the result does not depend on how threads are scheduled.
#pragma once
#include <cmath>

#include "arena.h"
#include "micro_kernel.h"
#include "softmax.h"
#include "work_items.h"

namespace saccade::SACCADE_TARGET {

constexpr int kReceivedBits = 60;  // of a sum over all rows; the next one says that it is NaN
constexpr int64_t kReceivedNan = int64_t{1} << (kReceivedBits + 1);

// Numbers of the integer sums [batch][kv_heads][received_end].
SACCADE_INLINE int64_t received_count(const Problem& p) {
  return p.receives ? p.received_batch * p.kv_heads * p.received_end : 0;
}

// What a weight of 1 is in the integer sums: no sum over the rows of a KV head exceeds 2^60.
SACCADE_INLINE double received_unit(const Problem& p) {
  int64_t rows = 1;
  for (int64_t i = 0; i < p.num_sequences; ++i) rows = max(rows, p.sequences[i].q_len * p.group);
  return std::ldexp(1.0, kReceivedBits - (p.largest ? 0 : 1 + std::ilogb((double)rows)));
}

// The integers as float32: the mean of the heads of a group, or the largest.
static void finish_received(const Problem& p, const int64_t* sums) {
  const double unit = 1 / (received_unit(p) * (p.largest ? 1 : p.group));
  for (int64_t i = 0; i < received_count(p); ++i)
    p.received[i] = sums[i] >= kReceivedNan ? __builtin_nanf("") : (float)(sums[i] * unit);
}

class Received {
 public:
  void lay_out(Arena& arena, const Problem& p, const WorkItem& item, int64_t padded_rows) {
    const int64_t tiles = ceil_div(visible_keys(p, item), kTile) + 2;
    positions_ = arena.take<int32_t>(tiles * kTile);
    strips_ = arena.take<Strip>(tiles * ceil_div(padded_rows, 2));
    weights_ = arena.take<float>(tiles * padded_rows * kTile);
    maxima_ = arena.take<float>(tiles * padded_rows);
  }

  void start() { num_tiles_ = num_strips_ = num_weights_ = num_maxima_ = 0; }

  void next_tile(const Tile& tile) {
    int32_t* out = positions_ + num_tiles_++ * kTile;
    for (int j = 0; j < kTile; ++j) out[j] = j < tile.count ? tile.positions[j] : kNoKey;
  }

  // Keeps the weights of `rows` rows from `first` for columns begin .. end of the tile, multiples
  // of a panel, and the maxima that they were computed with.
  void keep(int first, int rows, const float* weights, int stride, const float* maxima, int begin,
            int end) {
    const int width = end - begin;
    strips_[num_strips_++] = {num_tiles_ - 1, first, rows, begin, end, num_weights_, num_maxima_};
    for (int i = 0; i < rows; ++i, num_weights_ += width)
      for (int c = 0; c < width; c += W)
        store(weights_ + num_weights_ + c, load(weights + i * stride + begin + c));
    for (int i = 0; i < rows; ++i) maxima_[num_maxima_++] = maxima[first + i];
  }

  // Adds what the item gives to the sums of its KV head; lse in powers of two, +inf for rows that
  // do not count.
  void add(const Problem& p, int64_t* sums, double unit, const float* lse) const {
    int64_t strip = 0;
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      alignas(64) float found[kTile] = {};
      for (; strip < num_strips_ && strips_[strip].tile == tile; ++strip) {
        const Strip& s = strips_[strip];
        p.largest ? weigh<true>(s, lse, found) : weigh<false>(s, lse, found);
      }
      const int32_t* positions = positions_ + tile * kTile;
      for (int j = 0; j < kTile; ++j)
        if (found[j] != 0.f && positions[j] < p.received_end)
          put(sums + positions[j], found[j], unit, p.largest, p.threads > 1);
    }
  }

 private:
  struct Strip {
    int64_t tile;
    int first, rows, begin, end;
    int64_t weights, maxima;
  };

  template <bool Largest>
  void weigh(const Strip& s, const float* lse, float* found) const {
    const int width = s.end - s.begin;
    alignas(64) float factor[kStripPad];
    for (int i = 0; i < s.rows; i += W)  // both arrays are followed by others
      store(factor + i, exp2_negative(sub(load(maxima_ + s.maxima + i), load(lse + s.first + i))));
    for (int c = 0; c < width; c += kColumns) {
      F sum[kVectors];
      SACCADE_UNROLL for (int n = 0; n < kVectors; ++n) sum[n] = load(found + s.begin + c + n * W);
      const float* w = weights_ + s.weights + c;
      for (int i = 0; i < s.rows; ++i, w += width) {
        const F x = set1(factor[i]);
        SACCADE_UNROLL for (int n = 0; n < kVectors; ++n)
          sum[n] = Largest ? max(sum[n], mul(load(w + n * W), x)) : fma(load(w + n * W), x, sum[n]);
      }
      SACCADE_UNROLL for (int n = 0; n < kVectors; ++n) store(found + s.begin + c + n * W, sum[n]);
    }
  }

  static void put(int64_t* at, float x, double unit, bool largest, bool shared) {
    const int64_t added = x == x ? (int64_t)(x * unit) : 0;
    if (x != x) {
      __atomic_fetch_or(at, kReceivedNan, __ATOMIC_RELAXED);
    } else if (!shared) {
      *at = largest ? (*at > added ? *at : added) : *at + added;
    } else if (!largest) {
      __atomic_fetch_add(at, added, __ATOMIC_RELAXED);
    } else {
      int64_t now = __atomic_load_n(at, __ATOMIC_RELAXED);
      while (now < added && !__atomic_compare_exchange_n(at, &now, added, true, __ATOMIC_RELAXED,
                                                         __ATOMIC_RELAXED)) {
      }
    }
  }

  static constexpr int kStripPad = 32 + W;

  int64_t num_tiles_ = 0, num_strips_ = 0, num_weights_ = 0, num_maxima_ = 0;
  int32_t* positions_ = nullptr;
  Strip* strips_ = nullptr;
  float *weights_ = nullptr, *maxima_ = nullptr;
};

}  // namespace saccade::SACCADE_TARGET
