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

template <int Bits, int R>
static void wide_products(const PackedMatrix& w, int64_t block, const Inputs& x, int64_t row,
                          Products<R> y) {
  const Columns<Bits> numbers(w);
  for (int lane = 0; lane < kBlockRows; lane += W) {
    const uint8_t* q = block_data(w, block);
    int64_t at = block_scales(w, block) + lane;
    F total[R];
    SACCADE_UNROLL for (int r = 0; r < R; ++r) total[r] = zero();
    for (int64_t k = 0; k < w.in; k += w.group, at += kBlockRows) {
      F sum[R];
      SACCADE_UNROLL for (int r = 0; r < R; ++r) sum[r] = zero();
      for (int64_t first = k; first < k + w.group; first += kColumns, q += bytes_at_once<Bits>()) {
        const float* from = x.wide + row * x.in + first;
        SACCADE_UNROLL for (int c = 0; c < kColumns; ++c) {
          const F value = numbers.get(q, lane, c);
          SACCADE_UNROLL for (int r = 0; r < R; ++r)
            sum[r] = fma(value, set1(from[r * x.in + c]), sum[r]);
        }
      }
      add_group<R>(w, x, row, at, k, sum, total);
    }
    SACCADE_UNROLL for (int r = 0; r < R; ++r) store(y[r] + lane, total[r]);
  }
}

#if defined(SACCADE_DOT)
// Sixteen columns of 4 or 6 bits as bfloat16, found in tables of all numbers.
template <int Bits>
class DotColumns {
 public:
  explicit DotColumns(const PackedMatrix& w) {
    alignas(64) Bf16 values[64];
    for (int i = 0; i < 64; i += W) {
      alignas(64) float lanes[W];
      // An index of 5 bits into the numbers of 4 may hold any fifth one.
      for (int j = 0; j < W; ++j) lanes[j] = (float)((Bits == 4 ? j : i + j) - centre_of(w));
      store(values + i, load(lanes));
    }
    first_ = _mm512_load_si512(values);
    second_ = _mm512_load_si512(values + 32);
  }

  // Columns 2 j and 2 j + 1 of the sixteen at q.
  SACCADE_INLINE_MEMBER __m512i get(const uint8_t* q, int j) const {
    const __m512i low = _mm512_srli_epi16(_mm512_loadu_si512(q + j / 4 * 64), 4 * (j % 4));
    if (Bits == 4) return _mm512_permutexvar_epi16(low, first_);
    const __m512i runs = _mm512_loadu_si512(q + 128);
    const __m512i upper = j < 2 ? _mm512_slli_epi16(runs, j < 2 ? 4 - 2 * j : 0)
                                : _mm512_srli_epi16(runs, j < 2 ? 0 : 2 * j - 4);
    constexpr int kSelect = 0xca;  // bit by bit: first ? second : third
    const __m512i index =
        _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), low, upper, kSelect);
    return _mm512_permutex2var_epi16(first_, index, second_);
  }

 private:
  __m512i first_, second_;
};

SACCADE_INLINE __m512i pair_at(const Bf16* x) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  return _mm512_set1_epi32(pair);
}

template <int Bits, int R, bool kSplit>
static void dot_products(const PackedMatrix& w, int64_t block, const Inputs& x, int64_t row,
                         Products<R> y) {
  const DotColumns<Bits> numbers(w);
  const uint8_t* q = block_data(w, block);
  int64_t at = block_scales(w, block);
  F total[R];
  SACCADE_UNROLL for (int r = 0; r < R; ++r) total[r] = zero();
  for (int64_t k = 0; k < w.in; k += w.group, at += kBlockRows) {
    F sum[R], rest[R];
    SACCADE_UNROLL for (int r = 0; r < R; ++r) sum[r] = rest[r] = zero();
    for (int64_t c = k; c < k + w.group; c += kColumns, q += bytes_at_once<Bits>())
      SACCADE_UNROLL for (int j = 0; j < kColumns / 2; ++j) {
        const __m512i pairs = numbers.get(q, j);
        SACCADE_UNROLL for (int r = 0; r < R; ++r) {
          const int64_t from = (row + r) * x.in + c + 2 * j;
          sum[r] = dot_pairs(pairs, pair_at(x.high + from), sum[r]);
          if (kSplit) rest[r] = dot_pairs(pairs, pair_at(x.low + from), rest[r]);
        }
      }
    if (kSplit) SACCADE_UNROLL for (int r = 0; r < R; ++r) sum[r] = add(sum[r], rest[r]);
    add_group<R>(w, x, row, at, k, sum, total);
  }
  SACCADE_UNROLL for (int r = 0; r < R; ++r) store(y[r], total[r]);
}
#endif

template <int R>
SACCADE_INLINE void block_products(const PackedMatrix& w, int64_t block, const Inputs& x,
                                   int64_t row, Products<R> y) {
  for_bits(w.bits, [&]<int Bits>() {
#if defined(SACCADE_DOT)
    if constexpr (Bits != 8) {
      if (x.low) return dot_products<Bits, R, true>(w, block, x, row, y);
      return dot_products<Bits, R, false>(w, block, x, row, y);
    }
#endif
    wide_products<Bits, R>(w, block, x, row, y);
  });
}

}  // namespace saccade::SACCADE_TARGET
