// The two products of a strip of rows with packed pairs of bfloat16, by AVX-512's dot products.
// amx_products.h has the same functions by the matrix tiles of AMX.
//
// Each step loads 32 pairs of B once and broadcasts MR pairs of A: twice the arithmetic of the
// float32 micro-kernel for the same loads.
#pragma once
#include "pack_pairs.h"

#if defined(SACCADE_DOT)
namespace saccade::SACCADE_TARGET {

constexpr int kWeightStride = kTile + 32;  // bfloat16; an odd number of cache lines

// Pair (i, k) of A lies at a[i * RS + k * CS]; B is a panel of pairs [depth][32].
template <int MR, int NV, int RS, int CS, class Finish>
SACCADE_INLINE void multiply_pairs(const int32_t* __restrict a, const Bf16* __restrict b, int depth,
                                   Finish&& finish) {
  F acc[MR][NV];
  SACCADE_UNROLL for (int i = 0; i < MR; ++i)
    SACCADE_UNROLL for (int n = 0; n < NV; ++n) acc[i][n] = zero();
  for (int k = 0; k < depth; ++k) {
    __m512i row[NV];
    SACCADE_UNROLL for (int n = 0; n < NV; ++n) row[n] = _mm512_loadu_si512(b + n * kPair);
    SACCADE_UNROLL for (int i = 0; i < MR; ++i) {
      const __m512i x = _mm512_set1_epi32(a[i * RS]);
      SACCADE_UNROLL for (int n = 0; n < NV; ++n) acc[i][n] = dot_pairs(x, row[n], acc[i][n]);
    }
    a += CS;
    b += kVectors * kPair;
  }
  finish(acc);
}

struct DotProducts {
  static constexpr int kStrip = kRows;
  static constexpr int kDepth = 2;  // channels and keys are multiplied in multiples of this

  struct Session {};  // nothing to set up

  template <class Visit>
  SACCADE_INLINE void each_strip(int num_rows, Visit&& visit) {
    strips_of_rows(num_rows, visit);
  }

  // Row i of a strip [depth / 2][MR] of pairs.
  template <int MR>
  SACCADE_INLINE void place_query(const Bf16* x, int depth, int i, Bf16* strip) {
    for (int d = 0; d < depth; d += 2)
      std::memcpy(strip + (int64_t)d * MR + 2 * i, x + d, 2 * sizeof *x);
  }

  // Scores [MR][32] of a strip with a panel of keys.
  template <int MR, int Parts>
  SACCADE_INLINE void score(const Bf16* q, int64_t, const Bf16* k, int64_t, int depth, float* s) {
    static_assert(Parts == 1);
    multiply_pairs<MR, kVectors, 1, MR>((const int32_t*)q, k, depth / 2, [&](auto& acc) {
      SACCADE_UNROLL for (int i = 0; i < MR; ++i)
        SACCADE_UNROLL for (int n = 0; n < kVectors; ++n)
          store(s + i * kScoreStride + n * W, acc[i][n]);
    });
  }

  // o = o * alpha + P V for NV * W channels.
  template <int MR, int NV, int Parts>
  SACCADE_INLINE void accumulate(const Bf16* p, int64_t, const Bf16* v, int64_t, int keys,
                                 const float* alpha, float* o, int64_t o_stride) {
    static_assert(Parts == 1);
    constexpr int stride = kWeightStride / 2;
    multiply_pairs<MR, NV, stride, 1>((const int32_t*)p, v, keys / 2, [&](auto& acc) {
      SACCADE_UNROLL for (int i = 0; i < MR; ++i) {
        const F rescale = set1(alpha[i]);
        SACCADE_UNROLL for (int n = 0; n < NV; ++n) {
          float* at = o + i * o_stride + n * W;
          store(at, fma(load(at), rescale, acc[i][n]));
        }
      }
    });
  }
};

}  // namespace saccade::SACCADE_TARGET
#endif
