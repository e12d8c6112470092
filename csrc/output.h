// From running sums to results: out = o / l and lse = ln(sum of exponentials).
#pragma once
#include "problem.h"
#include "simd.h"

namespace saccade::SACCADE_TARGET {

SACCADE_INLINE float log2_of(float x) { return __builtin_log2f(x); }

template <class T>
SACCADE_INLINE void store_scaled(T* out, const float* o, float factor, int n) {
  int d = 0;
  for (; d + W <= n; d += W) store(out + d, mul(load(o + d), set1(factor)));
  if (d < n) store_part(out + d, mul(load_part(o + d, n - d), set1(factor)), n - d);
}

// A float32 row times a factor, stored in any float dtype.
SACCADE_INLINE void store_row(Dtype dtype, char* out, const float* o, float factor, int n) {
  switch (dtype) {
    case Dtype::f32: return store_scaled((float*)out, o, factor, n);
    case Dtype::bf16: return store_scaled((Bf16*)out, o, factor, n);
    default: return store_scaled((F16*)out, o, factor, n);
  }
}

// Writes a finished row: `o` unnormalized, sum of exponentials l * 2^m.
static void write_row(const Problem& p, const Sequence& s, int64_t query, int64_t head,
                      const float* o, float m, float l) {
  char* out = p.out.data + s.batch * p.out.batch + head * p.out.head +
              (s.q_begin + query) * p.out.row;
  store_row(p.out.dtype, out, o, l == 0.f ? 0.f : 1.f / l, (int)p.value_dim);
  if (p.lse) {
    float* lse = p.lse + s.batch * p.lse_batch + head * p.lse_head + s.q_begin + query;
    *lse = l == 0.f ? -kInf : (m + log2_of(l)) * kLn2;
  }
}

}  // namespace saccade::SACCADE_TARGET
