// The online softmax (arXiv 1805.02867) over a strip of scores, in powers of two.
//
// Scores arrive multiplied by log2(e), so exp becomes 2^x.  For each row: m is the largest score so
// far, l the sum of 2^(score - m) (kept as one partial sum per lane until the end), and alpha the
// factor 2^(m_old - m_new) that rescales everything summed before.
#pragma once
#include "rows.h"
#include "simd.h"

namespace saccade::SACCADE_TARGET {

constexpr int kScoreStride = kTile + 16;  // not a power of two: rows spread over the cache sets

struct Softmax {
  float* m;      // [rows]
  float* alpha;  // [rows]
  float* l;      // [rows][W]
};

struct Scoring {
  bool masked, alibi;
  float softcap;  // softcap * log2(e), 0 for none
  int32_t sinks;
  float factor = 1.f;  // of the scores as they arrive

  // Whether scores are only multiplied by the factor, so that their order stays.
  SACCADE_INLINE_MEMBER bool plain() const {
    return !masked && !alibi && softcap == 0.f && factor > 0.f;
  }
};

// Softcap, bias and mask of one row; leaves the final scores in place and returns their maximum.
SACCADE_INLINE F adjust_row(const Scoring& how, const Row& row, const int32_t* positions, float* s,
                            int begin, int end) {
  F top = set1(-kInf);
  for (int c = begin; c < end; c += W) {
    F x = mul(load(s + c), set1(how.factor));
    const I at = loadi(positions + c);
    if (how.softcap != 0.f) x = mul(tanh(x), set1(how.softcap));
    if (how.alibi) {
      const F distance = abs(to_float(subi(set1i(row.position), at)));
      x = fma(set1(-row.slope), distance, x);
    }
    if (how.masked) x = select(visible_lanes(row, how.sinks, at), x, set1(-kInf));
    store(s + c, x);
    top = max(x, top);
  }
  return top;
}

SACCADE_INLINE F plain_row_max(const float* s, int begin, int end) {
  F top = load(s + begin);
  for (int c = begin + W; c < end; c += W) top = max(load(s + c), top);
  return top;
}

// Maxima and alpha of MR rows whose strip maxima are `top`.  On return `top` holds what to subtract
// from the scores: the new maximum, or 0 where a row has attended to nothing so far.
template <int MR>
SACCADE_INLINE void update_maxima(Softmax state, int row, float* top) {
  constexpr int padded = (MR + W - 1) / W * W;
  alignas(64) float before[padded] = {};
  for (int i = 0; i < MR; ++i) {
    before[i] = state.m[row + i];
    const float m = top[i] > before[i] || top[i] != top[i] ? top[i] : before[i];
    state.m[row + i] = m;
    top[i] = m == -kInf ? 0.f : m;  // 2^(-inf - 0) = 0
  }
  for (int i = 0; i < MR; i += W) {
    alignas(64) float alpha[W];
    store(alpha, exp2_negative(sub(load(before + i), load(top + i))));
    for (int j = 0; j < W && i + j < MR; ++j) state.alpha[row + i + j] = alpha[j];
  }
}

// The first half of a step for MR rows over score columns [begin, end), multiples of W: maxima and
// alpha.  Leaves what to subtract from the scores in `top`; they are final, but for `how.factor`
// where `how.plain()`.
// `positions_of(i)` gives the key positions of row i, kNoKey where another mask hides the key.
template <int MR, class PositionsOf>
SACCADE_INLINE void find_maxima(Softmax state, int row, const Row* rows, const Scoring& how,
                                PositionsOf&& positions_of, float* s, int ld, int begin, int end,
                                float* top) {
  const bool plain = how.plain();
  for (int i = 0; i < MR; ++i) {
    top[i] = plain ? hmax(plain_row_max(s + i * ld, begin, end)) * how.factor
                   : hmax(adjust_row(how, rows[row + i], positions_of(i), s + i * ld, begin, end));
  }
  update_maxima<MR>(state, row, top);
}

template <int MR>
constexpr int kMaximaRoom = (MR + W - 1) / W * W;

SACCADE_INLINE void exponentiate_row(float* s, int begin, int end, float anchor, float alpha,
                                     float* l) {
  F sum = mul(load(l), set1(alpha));
  for (int c = begin; c < end; c += W) {
    const F p = exp2_negative(sub(load(s + c), set1(anchor)));
    store(s + c, p);
    sum = add(sum, p);
  }
  store(l, sum);
}

// One step for MR rows; scores become weights.
template <int MR, class PositionsOf>
SACCADE_INLINE void online_softmax(Softmax state, int row, const Row* rows, const Scoring& how,
                                   PositionsOf&& positions_of, float* s, int ld, int begin,
                                   int end) {
  alignas(64) float top[kMaximaRoom<MR>] = {};
  find_maxima<MR>(state, row, rows, how, positions_of, s, ld, begin, end, top);
  for (int i = 0; i < MR; ++i)
    exponentiate_row(s + i * ld, begin, end, top[i], state.alpha[row + i], state.l + (row + i) * W);
}

}  // namespace saccade::SACCADE_TARGET
