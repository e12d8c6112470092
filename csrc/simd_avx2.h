// AVX2 + FMA + F16C: eight floats a register, sixteen registers.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace saccade::SACCADE_TARGET {

constexpr int W = 8;
using F = __m256;
using I = __m256i;
struct M {
  __m256 bits;
};

SACCADE_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
SACCADE_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
SACCADE_INLINE F set1(float x) { return _mm256_set1_ps(x); }
SACCADE_INLINE F zero() { return _mm256_setzero_ps(); }
SACCADE_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
SACCADE_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
SACCADE_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
SACCADE_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
SACCADE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
SACCADE_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
SACCADE_INLINE F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
SACCADE_INLINE F round(F a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SACCADE_INLINE float hmax(F a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
SACCADE_INLINE float hsum(F a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

SACCADE_INLINE I loadi(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
SACCADE_INLINE I set1i(int32_t x) { return _mm256_set1_epi32(x); }
SACCADE_INLINE I subi(I a, I b) { return _mm256_sub_epi32(a, b); }
SACCADE_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
SACCADE_INLINE M gt(I a, I b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b))}; }
SACCADE_INLINE M lt(F a, F b) { return {_mm256_cmp_ps(a, b, _CMP_LT_OQ)}; }
SACCADE_INLINE M both(M a, M b) { return {_mm256_and_ps(a.bits, b.bits)}; }
SACCADE_INLINE M either(M a, M b) { return {_mm256_or_ps(a.bits, b.bits)}; }
SACCADE_INLINE M negate(M a) { return {_mm256_xor_ps(a.bits, _mm256_castsi256_ps(set1i(-1)))}; }
SACCADE_INLINE F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m.bits); }

// p * 2^n for integral n in -126 .. 127.
SACCADE_INLINE F scale_by_pow2(F p, F n) {
  __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

SACCADE_INLINE F load(const Bf16* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
SACCADE_INLINE F load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
SACCADE_INLINE F load(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
SACCADE_INLINE void store(Bf16* p, F x) {  // round to nearest even; NaN stays NaN
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  rounded = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, nan));
  __m256i high = _mm256_srli_epi32(rounded, 16);
  __m256i quantized = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(quantized));
}
SACCADE_INLINE void store(F16* p, F x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// 8 x 8 transpose: pairs, quads, then 128-bit lanes.
SACCADE_INLINE void transpose(F (&r)[W]) {
  F t[W];
  SACCADE_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  SACCADE_UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  SACCADE_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  SACCADE_UNROLL for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// Sums of eight registers, one a lane: half as many shuffles as a transpose.
SACCADE_INLINE F sum_each(F (&r)[W]) {
  SACCADE_UNROLL for (int i = 0; i < 4; ++i)
    r[i] = add(_mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]),
               _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]));
  SACCADE_UNROLL for (int i = 0; i < 2; ++i)
    r[i] = add(_mm256_shuffle_ps(r[2 * i], r[2 * i + 1], 0x44),
               _mm256_shuffle_ps(r[2 * i], r[2 * i + 1], 0xee));
  return add(_mm256_permute2f128_ps(r[0], r[1], 0x20), _mm256_permute2f128_ps(r[0], r[1], 0x31));
}

// 4-bit integers: low nibbles of W bytes, then the high ones.
SACCADE_INLINE void load_nibbles(const uint8_t* p, F& low, F& high) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  low = _mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(15)));
  high = _mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 4));
}

// 2 W consecutive bfloat16: the even ones, then the odd ones, at one instruction each.
SACCADE_INLINE void load_pairs(const Bf16* p, F& even, F& odd) {
  const __m256i pairs = _mm256_loadu_si256((const __m256i*)p);
  even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
}

}  // namespace saccade::SACCADE_TARGET
