// From running sums to results: out = o / l and lse = ln(sum of exp), or partial results to merge.
#pragma once
#include "plan.h"
#include "pool.h"
#include "softmax.h"

namespace saccade::SACCADE_TARGET {

// Unnormalised results of pieces that saw a part of their keys, one row each.
struct Partials {
  float* o;  // [rows][value_dim]
  float* m;  // [rows], in powers of two
  float* l;  // [rows]
};

SACCADE_INLINE float log2_of(float x) { return __builtin_log2f(x); }

template <class T>
SACCADE_INLINE void store_scaled(T* out, const float* o, float factor, int n) {
  int d = 0;
  for (; d + W <= n; d += W) store(out + d, mul(load(o + d), set1(factor)));
  if (d < n) store_part(out + d, mul(load_part(o + d, n - d), set1(factor)), n - d);
}

// Writes a finished row: `o` unnormalised, sum of exponentials l * 2^m.
static void write_row(const Problem& p, const Sequence& s, int64_t query, int64_t head,
                      const float* o, float m, float l) {
  char* out = p.out.data + s.batch * p.out.batch + head * p.out.head +
              (s.q_begin + query) * p.out.row;
  const float factor = l == 0.f ? 0.f : 1.f / l;
  const int dim = (int)p.value_dim;
  switch (p.out.dtype) {
    case Dtype::f32: store_scaled((float*)out, o, factor, dim); break;
    case Dtype::bf16: store_scaled((Bf16*)out, o, factor, dim); break;
    default: store_scaled((F16*)out, o, factor, dim);
  }
  if (p.lse) {
    float* lse = p.lse + s.batch * p.lse_batch + head * p.lse_head + s.q_begin + query;
    *lse = l == 0.f ? -kInf : (m + log2_of(l)) * kLn2;
  }
}

// Joins the partial results of one row of a split piece and writes it.
static void merge_row(const Problem& p, const Sequence& s, const Partials& parts, int64_t first,
                      int64_t stride, int64_t splits, int64_t query, int64_t head) {
  alignas(64) float o[kMaxDim + W] = {};
  float m = -kInf, l = 0.f;
  for (int64_t i = 0; i < splits; ++i) {
    const float x = parts.m[first + i * stride];
    m = x > m || x != x ? x : m;
  }
  const float anchor = m == -kInf ? 0.f : m;
  const int dim = (int)p.value_dim;
  for (int64_t i = 0; i < splits; ++i) {
    const int64_t at = first + i * stride;
    alignas(64) float weight[W];
    store(weight, exp2_negative(sub(set1(parts.m[at]), set1(anchor))));
    if (parts.l[at] == 0.f) continue;
    l += parts.l[at] * weight[0];
    const float* part = parts.o + at * p.value_dim;
    for (int d = 0; d < dim; ++d) o[d] += part[d] * weight[0];
  }
  write_row(p, s, query, head, o, m, l);
}

}  // namespace saccade::SACCADE_TARGET
