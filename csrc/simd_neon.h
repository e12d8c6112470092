// NEON (aarch64): four floats a register, thirty-two registers.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace saccade::SACCADE_TARGET {

constexpr int W = 4;
using F = float32x4_t;
using I = int32x4_t;
using M = uint32x4_t;

SACCADE_INLINE F load(const float* p) { return vld1q_f32(p); }
SACCADE_INLINE void store(float* p, F x) { vst1q_f32(p, x); }
SACCADE_INLINE F set1(float x) { return vdupq_n_f32(x); }
SACCADE_INLINE F zero() { return vdupq_n_f32(0.f); }
SACCADE_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
SACCADE_INLINE F sub(F a, F b) { return vsubq_f32(a, b); }
SACCADE_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
SACCADE_INLINE F div(F a, F b) { return vdivq_f32(a, b); }
SACCADE_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
SACCADE_INLINE F max(F a, F b) { return vmaxq_f32(a, b); }
SACCADE_INLINE F abs(F a) { return vabsq_f32(a); }
SACCADE_INLINE F round(F a) { return vrndnq_f32(a); }
SACCADE_INLINE float hmax(F a) { return vmaxvq_f32(a); }
SACCADE_INLINE float hsum(F a) { return vaddvq_f32(a); }

SACCADE_INLINE I loadi(const int32_t* p) { return vld1q_s32(p); }
SACCADE_INLINE I set1i(int32_t x) { return vdupq_n_s32(x); }
SACCADE_INLINE I subi(I a, I b) { return vsubq_s32(a, b); }
SACCADE_INLINE F to_float(I a) { return vcvtq_f32_s32(a); }
SACCADE_INLINE M gt(I a, I b) { return vcgtq_s32(a, b); }
SACCADE_INLINE M lt(F a, F b) { return vcltq_f32(a, b); }
SACCADE_INLINE M both(M a, M b) { return vandq_u32(a, b); }
SACCADE_INLINE M either(M a, M b) { return vorrq_u32(a, b); }
SACCADE_INLINE M negate(M a) { return vmvnq_u32(a); }
SACCADE_INLINE F select(M m, F a, F b) { return vbslq_f32(m, a, b); }

// p * 2^n for integral n in -126 .. 127.
SACCADE_INLINE F scale_by_pow2(F p, F n) {
  int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
  return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}

SACCADE_INLINE F load(const Bf16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t*)p), 16));
}
SACCADE_INLINE F load(const F16* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
}
SACCADE_INLINE F load(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  uint16x8_t wide = vmovl_u8(vcreate_u8(four));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
}
SACCADE_INLINE void store(Bf16* p, F x) {  // round to nearest even; NaN stays NaN
  uint32x4_t bits = vreinterpretq_u32_f32(x);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  rounded = vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc00000));
  vst1_u16((uint16_t*)p, vshrn_n_u32(rounded, 16));
}
SACCADE_INLINE void store(F16* p, F x) {
  vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32(x)));
}

SACCADE_INLINE void transpose(F (&r)[W]) {
  float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
  r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

// Sums of four registers, one a lane.
SACCADE_INLINE F sum_each(F (&r)[W]) {
  transpose(r);
  return add(add(r[0], r[1]), add(r[2], r[3]));
}

// 4-bit integers: low nibbles of W bytes, then the high ones.
SACCADE_INLINE void load_nibbles(const uint8_t* p, F& low, F& high) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  const uint32x4_t bytes = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
  low = vcvtq_f32_u32(vandq_u32(bytes, vdupq_n_u32(15)));
  high = vcvtq_f32_u32(vshrq_n_u32(bytes, 4));
}

// 2 W consecutive bfloat16: the even ones, then the odd ones, at one instruction each.
SACCADE_INLINE void load_pairs(const Bf16* p, F& even, F& odd) {
  const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16((const uint16_t*)p));
  even = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
  odd = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000)));
}

}  // namespace saccade::SACCADE_TARGET
