// AVX-512 (F, BW, VL, DQ): sixteen floats a register, thirty-two registers.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace saccade::SACCADE_TARGET {

constexpr int W = 16;
using F = __m512;
using I = __m512i;
using M = __mmask16;

SACCADE_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
SACCADE_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
SACCADE_INLINE F set1(float x) { return _mm512_set1_ps(x); }
SACCADE_INLINE F zero() { return _mm512_setzero_ps(); }
SACCADE_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
SACCADE_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
SACCADE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
SACCADE_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
SACCADE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
SACCADE_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
SACCADE_INLINE F abs(F a) { return _mm512_abs_ps(a); }
SACCADE_INLINE F round(F a) { return _mm512_roundscale_ps(a, 8); }
SACCADE_INLINE float hmax(F a) { return _mm512_reduce_max_ps(a); }
SACCADE_INLINE float hsum(F a) { return _mm512_reduce_add_ps(a); }

SACCADE_INLINE I loadi(const int32_t* p) { return _mm512_loadu_si512(p); }
SACCADE_INLINE I set1i(int32_t x) { return _mm512_set1_epi32(x); }
SACCADE_INLINE I subi(I a, I b) { return _mm512_sub_epi32(a, b); }
SACCADE_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
SACCADE_INLINE M gt(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }
SACCADE_INLINE M lt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
SACCADE_INLINE M both(M a, M b) { return a & b; }
SACCADE_INLINE M either(M a, M b) { return a | b; }
SACCADE_INLINE M negate(M a) { return ~a; }
SACCADE_INLINE F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }

// p * 2^n for integral n.
SACCADE_INLINE F scale_by_pow2(F p, F n) { return _mm512_scalef_ps(p, n); }

SACCADE_INLINE F load(const Bf16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
SACCADE_INLINE F load(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
SACCADE_INLINE F load(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
SACCADE_INLINE void store(Bf16* p, F x) {  // round to nearest even; NaN stays NaN
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
SACCADE_INLINE void store(F16* p, F x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// 16 x 16 transpose: pairs, quads, then 128-bit lanes.
SACCADE_INLINE void transpose(F (&r)[W]) {
  F t[W];
  SACCADE_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  SACCADE_UNROLL for (int i = 0; i < 16; i += 4) {
    auto pd = [](F x) { return _mm512_castps_pd(x); };
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(t[i]), pd(t[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(t[i]), pd(t[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(t[i + 1]), pd(t[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(t[i + 1]), pd(t[i + 3])));
  }
  SACCADE_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  SACCADE_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Sums of sixteen registers, one a lane: half as many shuffles as a transpose.
SACCADE_INLINE F sum_each(F (&r)[W]) {
  auto pd = [](F x) { return _mm512_castps_pd(x); };
  auto ps = [](__m512d x) { return _mm512_castpd_ps(x); };
  SACCADE_UNROLL for (int i = 0; i < 8; ++i)
    r[i] = add(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]),
               _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
  SACCADE_UNROLL for (int i = 0; i < 4; ++i)
    r[i] = add(ps(_mm512_unpacklo_pd(pd(r[2 * i]), pd(r[2 * i + 1]))),
               ps(_mm512_unpackhi_pd(pd(r[2 * i]), pd(r[2 * i + 1]))));
  SACCADE_UNROLL for (int i = 0; i < 2; ++i)
    r[i] = add(_mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0x88),
               _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0xdd));
  return add(_mm512_shuffle_f32x4(r[0], r[1], 0x88), _mm512_shuffle_f32x4(r[0], r[1], 0xdd));
}

// 4-bit integers: low nibbles of W bytes, then the high ones.
SACCADE_INLINE void load_nibbles(const uint8_t* p, F& low, F& high) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  low = _mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(15)));
  high = _mm512_cvtepi32_ps(_mm512_srli_epi32(bytes, 4));
}

// 2 W consecutive bfloat16: the even ones, then the odd ones, at one instruction each.
SACCADE_INLINE void load_pairs(const Bf16* p, F& even, F& odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

#if defined(SACCADE_DOT)
// c + the dot product of each of W pairs of bfloat16.
SACCADE_INLINE F dot_pairs(__m512i a, __m512i b, F c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}

// 2 W floats as bfloat16, rounded to nearest even, in order; and back.
SACCADE_INLINE __m512i round_pairs(F a, F b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }
SACCADE_INLINE void widen_pairs(__m512i x, F& a, F& b) {
  auto widen = [](__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  a = widen(_mm512_castsi512_si256(x));
  b = widen(_mm512_extracti64x4_epi64(x, 1));
}

// 2^x, error below 3e-6 of it: far below a bfloat16 weight, in half of the instructions.  Minimax
// polynomial of degree 4 for 2^f, 0 <= f < 1; -inf gives 0, NaN stays NaN.
SACCADE_INLINE F exp2_rough(F x) {
  const F f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F p = fma(set1(0x1.bb7cd4p-7f), f, set1(0x1.aa13f0p-5f));
  p = fma(p, f, set1(0x1.ee798ap-3f));
  p = fma(p, f, set1(0x1.62d166p-1f));
  p = fma(p, f, set1(0x1.00002cp+0f));
  return _mm512_scalef_ps(p, x);  // scales by 2 to the floor of x
}
#endif

}  // namespace saccade::SACCADE_TARGET
