// The few vector operations the kernels are written in, for the target this file is compiled for.
//
// SACCADE_TARGET names both the namespace and the target; SACCADE_AVX512, SACCADE_AVX2 or
// SACCADE_NEON says which instructions it may use (none: portable code).  The same kernel source
// is compiled once for each target and chosen at run time.
#pragma once
#include <cstdint>
#include <cstring>

#define SACCADE_INLINE static inline __attribute__((always_inline))
#define SACCADE_INLINE_MEMBER inline __attribute__((always_inline))
#define SACCADE_NOINLINE __attribute__((noinline))
#define SACCADE_UNROLL _Pragma("GCC unroll 64")

namespace saccade::SACCADE_TARGET {
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
}  // namespace saccade::SACCADE_TARGET

#if defined(SACCADE_AVX512)
#include "simd_avx512.h"
#elif defined(SACCADE_AVX2)
#include "simd_avx2.h"
#elif defined(SACCADE_NEON)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

namespace saccade::SACCADE_TARGET {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInf = __builtin_inff();

// The first n < W elements, the other lanes 0.
template <class T>
SACCADE_INLINE F load_part(const T* p, int n) {
  T lanes[W] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <class T>
SACCADE_INLINE void store_part(T* p, F x, int n) {
  T lanes[W];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
}

// 2^x for x <= 0, error below 1 ulp; flushes to 0 below 2^-126 and keeps NaN.
// Minimax polynomial of degree 6 for 2^f on |f| <= 1/2 (relative error 1.9e-9).
SACCADE_INLINE F exp2_negative(F x) {
  F n = round(x);
  F f = sub(x, n);
  F p = fma(set1(0x1.41d334p-13f), f, set1(0x1.5f456ap-10f));
  p = fma(p, f, set1(0x1.3b2dbcp-7f));
  p = fma(p, f, set1(0x1.c6aed4p-5f));
  p = fma(p, f, set1(0x1.ebfbdap-3f));
  p = fma(p, f, set1(0x1.62e430p-1f));
  p = fma(p, f, set1(1.f));
  return select(lt(x, set1(-126.f)), zero(), scale_by_pow2(p, n));
}

// tanh: an odd polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel (coefficients: Cephes).
SACCADE_INLINE F tanh(F x) {
  F size = abs(x), square = mul(x, x);
  F p = fma(set1(-5.70498872745e-3f), square, set1(2.06390887954e-2f));
  p = fma(p, square, set1(-5.37397155531e-2f));
  p = fma(p, square, set1(1.33314422036e-1f));
  p = fma(p, square, set1(-3.33332819422e-1f));
  F near_zero = fma(mul(p, square), x, x);
  F e = exp2_negative(mul(size, set1(-2.f * kLog2e)));
  F far = div(sub(set1(1.f), e), add(set1(1.f), e));
  far = select(lt(x, zero()), sub(zero(), far), far);
  return select(lt(size, set1(0.625f)), near_zero, far);
}

}  // namespace saccade::SACCADE_TARGET
