// The two products of a strip of rows with packed pairs of bfloat16, by AMX (see pair_products.h).
//
// Two tiles of 16 rows times two of 16 columns: four accumulators, and each loaded tile is used
// twice.  Numbers of two parts are multiplied as high * high + high * low + low * high, all into
// the same accumulators; low * low is below 2^-16 of the product.
#pragma once
#include "amx.h"
#include "pair_products.h"

#if defined(SACCADE_AMX)
namespace saccade::SACCADE_TARGET {

struct AmxProducts {
  static constexpr int kStrip = 2 * kTileRows;
  static constexpr int kDepth = kTileDepth;

  // Tiles exist while a work item runs: a thread that keeps them slows its context switches.
  struct Session {
    Session() { configure_tiles(); }
    ~Session() { release_tiles(); }
  };

  template <class Visit>
  SACCADE_INLINE void each_strip(int num_rows, Visit&& visit) {
    int row = 0;
    for (; num_rows - row > kTileRows; row += kStrip) visit.template operator()<kStrip>(row);
    if (row < num_rows) visit.template operator()<kTileRows>(row);
  }

  // Row i of a strip [MR][depth].
  template <int MR>
  SACCADE_INLINE void place_query(const Bf16* x, int depth, int i, Bf16* strip) {
    std::memcpy(strip + (int64_t)i * depth, x, depth * sizeof *x);
  }

  template <int MR, int Parts>
  SACCADE_INLINE void score(const Bf16* q, int64_t q_part, const Bf16* k, int64_t k_part, int depth,
                            float* s) {
    zero_tile<0>();
    zero_tile<1>();
    if constexpr (MR == kStrip) {
      zero_tile<2>();
      zero_tile<3>();
    }
    multiply<MR, 2, Parts>(q, depth, q_part, k, k_part, depth);
    each_accumulator<MR, 2>([&]<int T>(int row, int column) {
      store_tile<T>(s + row * kScoreStride + column, kScoreStride * sizeof(float));
    });
  }

  template <int MR, int NV, int Parts>
  SACCADE_INLINE void accumulate(const Bf16* p, int64_t p_part, const Bf16* v, int64_t v_part,
                                 int keys, const float* alpha, float* o, int64_t o_stride) {
    rescale<MR, NV>(alpha, o, o_stride);
    each_accumulator<MR, NV>([&]<int T>(int row, int column) {
      load_tile<T>(o + row * o_stride + column, o_stride * sizeof(float));
    });
    multiply<MR, NV, Parts>(p, kWeightStride, p_part, v, v_part, keys);
    each_accumulator<MR, NV>([&]<int T>(int row, int column) {
      store_tile<T>(o + row * o_stride + column, o_stride * sizeof(float));
    });
  }

 private:
  // Accumulator 2 r + c holds rows 16 r and columns 16 c onwards.
  template <int MR, int NV, class Visit>
  SACCADE_INLINE void each_accumulator(Visit&& visit) {
    visit.template operator()<0>(0, 0);
    if constexpr (NV == 2) visit.template operator()<1>(0, W);
    if constexpr (MR == kStrip) visit.template operator()<2>(kTileRows, 0);
    if constexpr (MR == kStrip && NV == 2) visit.template operator()<3>(kTileRows, W);
  }

  // Most rows keep their maximum, so most factors are 1.
  template <int MR, int NV>
  SACCADE_INLINE void rescale(const float* alpha, float* o, int64_t o_stride) {
    for (int i = 0; i < MR; ++i) {
      if (alpha[i] == 1.f) continue;
      for (int n = 0; n < NV; ++n) {
        float* at = o + i * o_stride + n * W;
        store(at, mul(load(at), set1(alpha[i])));
      }
    }
  }

  template <int MR, int NV, int Parts>
  SACCADE_INLINE void multiply(const Bf16* a, int64_t a_stride, int64_t a_part, const Bf16* b,
                               int64_t b_part, int depth) {
    multiply_parts<MR, NV>(a, a_stride, b, depth);
    if constexpr (Parts == 2) {
      multiply_parts<MR, NV>(a, a_stride, b + b_part, depth);
      multiply_parts<MR, NV>(a + a_part, a_stride, b, depth);
    }
  }

  // Adds A[MR][depth] B[depth][NV * 16]; B is a panel of pairs [depth / 2][32].
  template <int MR, int NV>
  SACCADE_INLINE void multiply_parts(const Bf16* a, int64_t a_stride, const Bf16* b, int depth) {
    constexpr int64_t row = sizeof(Bf16), b_row = kVectors * kPair * row;
    for (int k = 0; k < depth; k += kTileDepth, a += kTileDepth, b += kTileDepth * kPair) {
      load_tile<6>(b, b_row);
      load_tile<4>(a, a_stride * row);
      multiply_tiles<0, 4, 6>();
      if constexpr (NV == 2) {
        load_tile<7>(b + kPair, b_row);
        multiply_tiles<1, 4, 7>();
      }
      if constexpr (MR == kStrip) {
        load_tile<5>(a + kTileRows * a_stride, a_stride * row);
        multiply_tiles<2, 5, 6>();
        if constexpr (NV == 2) multiply_tiles<3, 5, 7>();
      }
    }
  }
};

}  // namespace saccade::SACCADE_TARGET
#endif
