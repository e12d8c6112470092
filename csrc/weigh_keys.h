// Softmax weights of blocks of keys, from the scores of all keys (Kascade, arXiv 2512.16391).
//
// Of a block and a query what is kept is the highest score and the sum of exp2(score - highest).
#pragma once
#include "intmath.h"
#include "loaders.h"

namespace saccade::SACCADE_TARGET {

struct Weighed {
  float peak = -3e38f;  // of no key
  float sum = 0.f;
};

// Scores `q . k` of `count` keys, one row each; q: floats, padded by zeros to whole registers.
// `scores` has room for W more.
template <class T>
SACCADE_NOINLINE void score_keys(const float* q, const char* keys, int64_t row, int count, int dim,
                                 float* scores) {
  for (int j = 0; j < count; j += W) {
    F acc[W];
    const T* k[W];
    SACCADE_UNROLL for (int i = 0; i < W; ++i) {
      acc[i] = zero();
      k[i] = (const T*)(keys + min(j + i, count - 1) * row);
    }
    int d = 0;
    for (; d + W <= dim; d += W) {
      const F x = load(q + d);
      SACCADE_UNROLL for (int i = 0; i < W; ++i) acc[i] = fma(x, load(k[i] + d), acc[i]);
    }
    if (d < dim) {
      const F x = load(q + d);
      SACCADE_UNROLL for (int i = 0; i < W; ++i) {
        F last;
        get_part<Plain<T>>(k[i] + d, dim - d, &last);
        acc[i] = fma(x, last, acc[i]);
      }
    }
    store(scores + j, sum_each(acc));
  }
}

// The sum of exp2 of scores, whose logarithms are those of weights; scores become weights.
SACCADE_INLINE Weighed weigh(float* scores, int count) {
  Weighed found;
  for (int j = 0; j < count; ++j) found.peak = scores[j] > found.peak ? scores[j] : found.peak;
  F sum = zero();
  for (int j = 0; j < count; j += W) {
    const int n = min(W, count - j);
    const F weight = exp2_negative(sub(load_part(scores + j, n), set1(found.peak)));
    store(scores + j, weight);  // what is behind the last one is not a key
    sum = add(sum, n == W ? weight : load_part(scores + j, n));
  }
  found.sum = hsum(sum);
  return found;
}

// Adds the shares that `blocks` have of the weights of one query.
SACCADE_INLINE void add_shares(const Weighed* found, int64_t blocks, float* shares) {
  float peak = found[0].peak, all = 0.f;
  for (int64_t b = 1; b < blocks; ++b) peak = found[b].peak > peak ? found[b].peak : peak;
  for (int pass = 0; pass < 2; ++pass)
    for (int64_t b = 0; b < blocks; ++b) {
      const float weight = found[b].sum * hmax(exp2_negative(set1(found[b].peak - peak)));
      if (pass == 0)
        all += weight;
      else
        shares[b] += weight / all;
    }
}

}  // namespace saccade::SACCADE_TARGET
