// Ceilings of the machine, measured by the same means as the kernels: rates of products, in float32
// and of bfloat16 pairs, and read bandwidth.
#pragma once
#include "amx.h"
#include "simd.h"

namespace saccade::SACCADE_TARGET {

constexpr int kChains = 12;  // independent sums: more than two pipes of four cycles need

// Floating-point operations of `steps` steps.
static double fma_flops(int64_t steps) { return 2.0 * W * kChains * (double)steps; }

static float fma_chains(int64_t steps) {
  F x[kChains];
  F a = set1(0.999f), b = set1(0.001f);
  for (int i = 0; i < kChains; ++i) x[i] = set1((float)i);
  for (int64_t s = 0; s < steps; ++s) {
    SACCADE_UNROLL for (int i = 0; i < kChains; ++i) x[i] = fma(x[i], a, b);
  }
  F sum = x[0];
  for (int i = 1; i < kChains; ++i) sum = add(sum, x[i]);
  return hsum(sum);
}

#if defined(SACCADE_AMX)
static double pair_flops(int64_t steps) {
  return 2.0 * kTileRows * kTileRows * kTileDepth * 4 * (double)steps;
}

static float pair_chains(int64_t steps) {
  alignas(64) float sums[kTileRows][kTileRows] = {};
  configure_tiles();  // all tiles are zero
  for (int64_t s = 0; s < steps; ++s) {
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
  store_tile<0>(sums, sizeof sums[0]);
  release_tiles();
  return sums[0][0];
}
#elif defined(SACCADE_DOT)
static double pair_flops(int64_t steps) { return 4.0 * W * kChains * (double)steps; }

static float pair_chains(int64_t steps) {
  F x[kChains];
  const __m512i a = round_pairs(set1(0.5f), set1(0.5f));
  SACCADE_UNROLL for (int i = 0; i < kChains; ++i) x[i] = set1((float)i);
  for (int64_t s = 0; s < steps; ++s) {
    SACCADE_UNROLL for (int i = 0; i < kChains; ++i) x[i] = dot_pairs(a, a, x[i]);
  }
  F sum = x[0];
  SACCADE_UNROLL for (int i = 1; i < kChains; ++i) sum = add(sum, x[i]);
  return hsum(sum);
}
#else
static double pair_flops(int64_t) { return 0.0; }
static float pair_chains(int64_t) { return 0.f; }
#endif

static float read_all(const float* p, int64_t n) {  // n is a multiple of 8 * W
  F x[8];
  for (int i = 0; i < 8; ++i) x[i] = zero();
  for (int64_t at = 0; at < n; at += 8 * W)
    SACCADE_UNROLL for (int i = 0; i < 8; ++i) x[i] = add(x[i], load(p + at + i * W));
  F sum = x[0];
  for (int i = 1; i < 8; ++i) sum = add(sum, x[i]);
  return hsum(sum);
}

static void exp2_row(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const int count = (int)(n - i < W ? n - i : W);
    store_part(y + i, exp2_negative(load_part(x + i, count)), count);
  }
}

}  // namespace saccade::SACCADE_TARGET
