// A few rows of x times the sixteen rows of a block of packed weights.
//
// A lane is a row of the weight, so nothing is added up across lanes; each group is summed by
// itself and then scaled.  The work is reading the weights once.
#pragma once
#include "linear_inputs.h"
#include "linear_output.h"

namespace saccade::SACCADE_TARGET {

constexpr int kMostRows = W == 16 ? 8 : 4;  // of x at once

SACCADE_INLINE F load_half(const uint16_t* p) { return load((const F16*)p); }

// Sums of the groups, times their scales, into the rows' sums.
template <int R>
SACCADE_INLINE void add_group(const PackedMatrix& w, const Inputs& x, int64_t row, int64_t at,
                              int64_t k, const F* sum, F* total) {
  const F scale = load_half(w.scale + at);
  SACCADE_UNROLL for (int r = 0; r < R; ++r) total[r] = fma(sum[r], scale, total[r]);
  if (!w.minimum) return;
  const F minimum = load_half(w.minimum + at);
  SACCADE_UNROLL for (int r = 0; r < R; ++r) {
    const float* part = x.sums + ((row + r) * x.in + k) / kSum;
    total[r] = fma(set1(w.group == kSum ? part[0] : part[0] + part[1]), minimum, total[r]);
  }
}

// Eight columns of 4 bits, by float32 products.
struct WideNibbles {
  static constexpr int kColumns = 8;
  NibbleTable table;
  explicit WideNibbles(const PackedMatrix& w) : table(centre_of(w)) {}

  template <int R>
  SACCADE_INLINE_MEMBER void add(const uint8_t* q, int lane, const float* x, int64_t in,
                                 F* sum) const {
    const I numbers = loadi((const int32_t*)q + lane);
    SACCADE_UNROLL for (int c = 0; c < kColumns; ++c) {
      const F value = table.get(numbers, nibble_place(c));
      SACCADE_UNROLL for (int r = 0; r < R; ++r) sum[r] = fma(value, set1(x[r * in + c]), sum[r]);
    }
  }
};

// Four columns of 8 bits.
struct WideBytes {
  static constexpr int kColumns = 4;
  explicit WideBytes(const PackedMatrix&) {}

  template <int R>
  SACCADE_INLINE_MEMBER void add(const uint8_t* q, int lane, const float* x, int64_t in,
                                 F* sum) const {
    SACCADE_UNROLL for (int c = 0; c < kColumns; ++c) {
      const F value = load_signed((const int8_t*)q + c * kBlockRows + lane);
      SACCADE_UNROLL for (int r = 0; r < R; ++r) sum[r] = fma(value, set1(x[r * in + c]), sum[r]);
    }
  }
};

template <class Numbers, int R>
static void wide_products(const PackedMatrix& w, int64_t block, const Inputs& x, int64_t row,
                          Products<R> y) {
  constexpr int kStep = kBlockRows * 4;  // bytes of Numbers::kColumns columns
  const Numbers numbers(w);
  for (int lane = 0; lane < kBlockRows; lane += W) {
    const uint8_t* q = block_data(w, block);
    int64_t at = block_scales(w, block) + lane;
    F total[R];
    SACCADE_UNROLL for (int r = 0; r < R; ++r) total[r] = zero();
    for (int64_t k = 0; k < w.in; k += w.group, at += kBlockRows) {
      F sum[R];
      SACCADE_UNROLL for (int r = 0; r < R; ++r) sum[r] = zero();
      for (int64_t c = 0; c < w.group; c += Numbers::kColumns, q += kStep)
        numbers.template add<R>(q, lane, x.wide + row * x.in + k + c, x.in, sum);
      add_group<R>(w, x, row, at, k, sum, total);
    }
    SACCADE_UNROLL for (int r = 0; r < R; ++r) store(y[r] + lane, total[r]);
  }
}

#if defined(SACCADE_DOT)
// The sixteen numbers of 4 bits as bfloat16, twice: an index of five bits may hold any fifth one.
SACCADE_INLINE __m512i dot_table(int centre) {
  alignas(64) Bf16 values[32];
  for (int i = 0; i < 32; i += W) {
    alignas(64) float lanes[W];
    for (int j = 0; j < W; ++j) lanes[j] = (float)(j - centre);
    store(values + i, load(lanes));
  }
  return _mm512_load_si512(values);
}

SACCADE_INLINE __m512i pair_at(const Bf16* x) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// Eight columns of 4 bits: each shift brings another pair of columns to the tables' indices.
template <int R, bool kSplit>
SACCADE_INLINE void add_dots(const uint8_t* q, __m512i table, const Inputs& x, int64_t at, F* sum,
                             F* rest) {
  const __m512i numbers = _mm512_loadu_si512(q);
  SACCADE_UNROLL for (int j = 0; j < 4; ++j) {
    const __m512i pairs = _mm512_permutexvar_epi16(_mm512_srli_epi16(numbers, 4 * j), table);
    SACCADE_UNROLL for (int r = 0; r < R; ++r) {
      sum[r] = dot_pairs(pairs, pair_at(x.high + at + r * x.in + 2 * j), sum[r]);
      if (kSplit) rest[r] = dot_pairs(pairs, pair_at(x.low + at + r * x.in + 2 * j), rest[r]);
    }
  }
}

template <int R, bool kSplit>
static void dot_products(const PackedMatrix& w, int64_t block, const Inputs& x, int64_t row,
                         Products<R> y) {
  const __m512i table = dot_table(centre_of(w));
  const uint8_t* q = block_data(w, block);
  int64_t at = block_scales(w, block);
  F total[R];
  SACCADE_UNROLL for (int r = 0; r < R; ++r) total[r] = zero();
  for (int64_t k = 0; k < w.in; k += w.group, at += kBlockRows) {
    F sum[R], rest[R];
    SACCADE_UNROLL for (int r = 0; r < R; ++r) sum[r] = rest[r] = zero();
    for (int64_t c = 0; c < w.group; c += 8, q += 64)
      add_dots<R, kSplit>(q, table, x, row * x.in + k + c, sum, rest);
    if (kSplit) SACCADE_UNROLL for (int r = 0; r < R; ++r) sum[r] = add(sum[r], rest[r]);
    add_group<R>(w, x, row, at, k, sum, total);
  }
  SACCADE_UNROLL for (int r = 0; r < R; ++r) store(y[r], total[r]);
}
#endif

template <int R>
SACCADE_INLINE void block_products(const PackedMatrix& w, int64_t block, const Inputs& x,
                                   int64_t row, Products<R> y) {
  if (w.bits == 8) return wide_products<WideBytes, R>(w, block, x, row, y);
#if defined(SACCADE_DOT)
  if (x.low) return dot_products<R, true>(w, block, x, row, y);
  return dot_products<R, false>(w, block, x, row, y);
#else
  wide_products<WideNibbles, R>(w, block, x, row, y);
#endif
}

}  // namespace saccade::SACCADE_TARGET
