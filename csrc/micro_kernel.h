// The one matrix product: C[MR][NR] = A[MR][depth] * B[depth][NR], C held in registers.
//
// Each step loads NR floats of B once and broadcasts MR floats of A, which keeps the two FMA pipes
// busy: MR * NV accumulators must cover pipes x latency and still leave registers for B.
#pragma once
#include "simd.h"

namespace saccade::SACCADE_TARGET {

#if defined(SACCADE_AVX512)
constexpr int kRows = 12, kVectors = 2;  // 24 of 32 registers accumulate
#elif defined(SACCADE_AVX2)
constexpr int kRows = 6, kVectors = 2;  // 12 of 16
#elif defined(SACCADE_NEON)
constexpr int kRows = 8, kVectors = 2;  // 16 of 32
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int kColumns = kVectors * W;
#if defined(SACCADE_AMX)
constexpr int kRowStep = 96;  // full strips of 32 rows for the tiles, of 12 in float32
#else
constexpr int kRowStep = kRows;
#endif

// Element (i, k) of A lies at a[i * RS + k * CS]; B is a panel [depth][NV * W] with stride LB.
// `finish(acc)` says what becomes of the product while it is still in registers.
template <int MR, int NV, int RS, int CS, int LB, class Finish>
SACCADE_INLINE void multiply(const float* __restrict a, const float* __restrict b, int depth,
                             Finish&& finish) {
  F acc[MR][NV];
  SACCADE_UNROLL for (int i = 0; i < MR; ++i)
    SACCADE_UNROLL for (int n = 0; n < NV; ++n) acc[i][n] = zero();
  for (int k = 0; k < depth; ++k) {
    F row[NV];
    SACCADE_UNROLL for (int n = 0; n < NV; ++n) row[n] = load(b + n * W);
    SACCADE_UNROLL for (int i = 0; i < MR; ++i) {
      const F x = set1(a[i * RS]);
      SACCADE_UNROLL for (int n = 0; n < NV; ++n) acc[i][n] = fma(x, row[n], acc[i][n]);
    }
    a += CS;
    b += LB;
  }
  finish(acc);
}

}  // namespace saccade::SACCADE_TARGET
