// Portable: four floats in an array, which compilers may vectorize as the machine allows.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace saccade::SACCADE_TARGET {

constexpr int W = 4;
struct F {
  float lane[W];
};
struct I {
  int32_t lane[W];
};
struct M {
  bool lane[W];
};

#define SACCADE_LANES(R, expression)                \
  R r;                                              \
  for (int i = 0; i < W; ++i) r.lane[i] = expression; \
  return r

SACCADE_INLINE F load(const float* p) { SACCADE_LANES(F, p[i]); }
SACCADE_INLINE void store(float* p, F x) { std::memcpy(p, x.lane, sizeof x.lane); }
SACCADE_INLINE F set1(float x) { SACCADE_LANES(F, x); }
SACCADE_INLINE F zero() { return set1(0.f); }
SACCADE_INLINE F add(F a, F b) { SACCADE_LANES(F, a.lane[i] + b.lane[i]); }
SACCADE_INLINE F sub(F a, F b) { SACCADE_LANES(F, a.lane[i] - b.lane[i]); }
SACCADE_INLINE F mul(F a, F b) { SACCADE_LANES(F, a.lane[i] * b.lane[i]); }
SACCADE_INLINE F div(F a, F b) { SACCADE_LANES(F, a.lane[i] / b.lane[i]); }
SACCADE_INLINE F fma(F a, F b, F c) { SACCADE_LANES(F, a.lane[i] * b.lane[i] + c.lane[i]); }
SACCADE_INLINE F max(F a, F b) { SACCADE_LANES(F, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
SACCADE_INLINE F abs(F a) { SACCADE_LANES(F, __builtin_fabsf(a.lane[i])); }
SACCADE_INLINE F round(F a) { SACCADE_LANES(F, __builtin_rintf(a.lane[i])); }
SACCADE_INLINE float hmax(F a) {
  F x = max(a, F{{a.lane[2], a.lane[3], a.lane[0], a.lane[1]}});
  return x.lane[0] > x.lane[1] ? x.lane[0] : x.lane[1];
}
SACCADE_INLINE float hsum(F a) { return (a.lane[0] + a.lane[2]) + (a.lane[1] + a.lane[3]); }

SACCADE_INLINE I loadi(const int32_t* p) { SACCADE_LANES(I, p[i]); }
SACCADE_INLINE I set1i(int32_t x) { SACCADE_LANES(I, x); }
SACCADE_INLINE I subi(I a, I b) {  // wraps, as the vector instructions do
  SACCADE_LANES(I, (int32_t)((uint32_t)a.lane[i] - (uint32_t)b.lane[i]));
}
SACCADE_INLINE F to_float(I a) { SACCADE_LANES(F, (float)a.lane[i]); }
SACCADE_INLINE M gt(I a, I b) { SACCADE_LANES(M, a.lane[i] > b.lane[i]); }
SACCADE_INLINE M lt(F a, F b) { SACCADE_LANES(M, a.lane[i] < b.lane[i]); }
SACCADE_INLINE M both(M a, M b) { SACCADE_LANES(M, a.lane[i] && b.lane[i]); }
SACCADE_INLINE M either(M a, M b) { SACCADE_LANES(M, a.lane[i] || b.lane[i]); }
SACCADE_INLINE M negate(M a) { SACCADE_LANES(M, !a.lane[i]); }
SACCADE_INLINE F select(M m, F a, F b) { SACCADE_LANES(F, m.lane[i] ? a.lane[i] : b.lane[i]); }

SACCADE_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
SACCADE_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

// p * 2^n for integral n in -126 .. 127; any other n only where the caller drops the lane.
SACCADE_INLINE F scale_by_pow2(F p, F n) {
  F r;
  for (int i = 0; i < W; ++i) {
    bool usable = n.lane[i] >= -126.f && n.lane[i] <= 127.f;
    int exponent = usable ? (int)n.lane[i] : 0;
    r.lane[i] = p.lane[i] * from_bits((uint32_t)(exponent + 127) << 23);
  }
  return r;
}

SACCADE_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Scaling by 2^112 moves the exponent bias and makes denormals right without a branch.
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000)));
}
SACCADE_INLINE uint16_t float_to_half(float x) {
  uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (rest < 0x38800000)  // denormal half: adding 0.5 aligns the bits and rounds to nearest even
    return (uint16_t)(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000));
  uint32_t rounded = rest + 0xfff + ((rest >> 13) & 1);
  return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}
SACCADE_INLINE uint16_t float_to_bf16(float x) {
  uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

SACCADE_INLINE F load(const Bf16* p) { SACCADE_LANES(F, from_bits((uint32_t)p[i].bits << 16)); }
SACCADE_INLINE F load(const F16* p) { SACCADE_LANES(F, half_to_float(p[i].bits)); }
SACCADE_INLINE F load(const uint8_t* p) { SACCADE_LANES(F, (float)p[i]); }
SACCADE_INLINE void store(Bf16* p, F x) {
  for (int i = 0; i < W; ++i) p[i].bits = float_to_bf16(x.lane[i]);
}
SACCADE_INLINE void store(F16* p, F x) {
  for (int i = 0; i < W; ++i) p[i].bits = float_to_half(x.lane[i]);
}

SACCADE_INLINE void transpose(F (&r)[W]) {
  F t[W];
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) t[i].lane[j] = r[j].lane[i];
  for (int i = 0; i < W; ++i) r[i] = t[i];
}

// Sums of four registers, one a lane.
SACCADE_INLINE F sum_each(F (&r)[W]) {
  transpose(r);
  return add(add(r[0], r[1]), add(r[2], r[3]));
}

// 4-bit integers: low nibbles of W bytes, then the high ones.
SACCADE_INLINE void load_nibbles(const uint8_t* p, F& low, F& high) {
  for (int i = 0; i < W; ++i) {
    low.lane[i] = (float)(p[i] & 15);
    high.lane[i] = (float)(p[i] >> 4);
  }
}

// 2 W consecutive bfloat16: the even ones, then the odd ones.
SACCADE_INLINE void load_pairs(const Bf16* p, F& even, F& odd) {
  for (int i = 0; i < W; ++i) {
    even.lane[i] = from_bits((uint32_t)p[2 * i].bits << 16);
    odd.lane[i] = from_bits((uint32_t)p[2 * i + 1].bits << 16);
  }
}

#undef SACCADE_LANES

}  // namespace saccade::SACCADE_TARGET
