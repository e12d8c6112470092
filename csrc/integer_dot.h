// Products with quantized keys and values in integers, for 16-bit queries: four byte products or
// two 16-bit products a lane and instruction, where converting them to float would cost as much as
// the arithmetic.
//
// Queries (times the scales of a key group) become integers of 15 bits, written as hi * 128 + lo in
// two signed bytes; weights (times the scale of a value) become integers of 16 bits.  Their error,
// 2^-15 of the largest, is far below that of 16-bit floats.  Sums are exact in int32: at most
// 576 * 255 * 128 for keys, and 128 keys * 255 * 32767 for values.
#pragma once
#include "tiles.h"

#if defined(SACCADE_DOT)
namespace saccade::SACCADE_TARGET {

struct IntegerQuery {
  alignas(64) int8_t hi[kDimPad], lo[kDimPad];
  float step;  // value of one unit
};

// Queries times the scales of a key group as integers, and bias = q . offset.  What rounding leaves
// over joins the bias times the middle of the range, which halves the error.  Rows advance side by
// side, so that none waits for its own sums.  Everything is padded with zeros to full registers.
template <int R>
SACCADE_INLINE void queries_to_integers(const float* const* q, const float* scale,
                                        const float* offset, int dim, float middle,
                                        IntegerQuery* out, float* bias) {
  F top[R], offset_sum[R], residue[R], inverse[R], step[R];
  SACCADE_UNROLL for (int r = 0; r < R; ++r) top[r] = offset_sum[r] = residue[r] = zero();
  for (int d = 0; d < dim; d += W)
    SACCADE_UNROLL for (int r = 0; r < R; ++r) {
      const F x = load(q[r] + d);
      top[r] = max(abs(mul(x, load(scale + d))), top[r]);
      offset_sum[r] = fma(x, load(offset + d), offset_sum[r]);
    }
  SACCADE_UNROLL for (int r = 0; r < R; ++r) {
    const float largest = hmax(top[r]);
    out[r].step = largest > 0.f ? largest * (1.f / 16256.f) : 1.f;
    inverse[r] = set1(1.f / out[r].step);
    step[r] = set1(-out[r].step);
  }
  for (int d = 0; d < dim; d += W)
    SACCADE_UNROLL for (int r = 0; r < R; ++r) {
      const F x = mul(load(q[r] + d), load(scale + d));
      const __m512i value = _mm512_cvtps_epi32(mul(x, inverse[r]));
      residue[r] = add(residue[r], fma(to_float(value), step[r], x));
      const __m512i hi = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(64)), 7);
      const __m512i lo = _mm512_sub_epi32(value, _mm512_slli_epi32(hi, 7));
      _mm_storeu_si128((__m128i*)(out[r].hi + d), _mm512_cvtepi32_epi8(hi));
      _mm_storeu_si128((__m128i*)(out[r].lo + d), _mm512_cvtepi32_epi8(lo));
    }
  SACCADE_UNROLL for (int r = 0; r < R; ++r)
    bias[r] = hsum(fma(residue[r], set1(middle), offset_sum[r]));
}

SACCADE_INLINE __m512i load_bytes(const char* p, int n) {  // n of 64 bytes, the others 0
  return n >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((__mmask64(1) << n) - 1, p);
}

SACCADE_INLINE __m512i four_bytes(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}

// Scores of R queries against 16 quantized keys, a key in each lane: their bytes are transposed
// four channels at a time, so that nothing has to be summed across lanes.
template <int R, int Bits>
SACCADE_NOINLINE void score_keys16(const char* const* keys, int dim, const IntegerQuery* q,
                                    const float* bias, float* const* out) {
  const int bytes = dim * Bits / 8;
  __m512i hi[R], lo[R];
  SACCADE_UNROLL for (int r = 0; r < R; ++r) hi[r] = lo[r] = _mm512_setzero_si512();
  for (int at = 0; at < bytes; at += 64) {
    const int rest = bytes - at < 64 ? bytes - at : 64;
    F rows[W];
    SACCADE_UNROLL for (int i = 0; i < W; ++i)
      rows[i] = _mm512_castsi512_ps(load_bytes(keys[i] + at, rest));
    transpose(rows);
    alignas(64) __m512i qdata[W];
    SACCADE_UNROLL for (int i = 0; i < W; ++i) qdata[i] = _mm512_castps_si512(rows[i]);
    for (int c = 0; c * 4 < rest; ++c) {
      auto add_products = [&](__m512i x, int d) __attribute__((always_inline)) {
        SACCADE_UNROLL for (int r = 0; r < R; ++r) {
          hi[r] = _mm512_dpbusd_epi32(hi[r], x, four_bytes(q[r].hi + d));
          lo[r] = _mm512_dpbusd_epi32(lo[r], x, four_bytes(q[r].lo + d));
        }
      };
      const int d = at + c * 4;
      if (Bits == 8) {
        add_products(qdata[c], d);
      } else {
        const __m512i nibble = _mm512_set1_epi8(15);
        add_products(_mm512_and_si512(qdata[c], nibble), d);
        add_products(_mm512_and_si512(_mm512_srli_epi32(qdata[c], 4), nibble), dim / 2 + d);
      }
    }
  }
  SACCADE_UNROLL for (int r = 0; r < R; ++r) {
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(hi[r], 7), lo[r]);
    store(out[r], fma(to_float(sum), set1(q[r].step), set1(bias[r])));
  }
}

struct IntegerWeights {
  alignas(64) int16_t weight[kTile];
  float step;
};

// `n` is a multiple of W.
SACCADE_INLINE void weights_to_integers(const float* p, int n, IntegerWeights& out) {
  F top = zero();
  for (int j = 0; j < n; j += W) top = max(abs(load(p + j)), top);
  const float largest = hmax(top);
  out.step = largest > 0.f ? largest / 32767.f : 1.f;
  const F scale = set1(1.f / out.step);
  for (int j = 0; j < n; j += W)
    _mm256_storeu_si256((__m256i*)(out.weight + j),
                        _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(mul(load(p + j), scale))));
}

// Bytes [begin, end) of rows to prefetch meanwhile, a row for each value.
struct PrefetchRows {
  const char* const* rows;
  int count;
  int64_t begin, end;
};

// Which part of a byte is a channel.
enum class Nibble { none, low, high };

// Up to 64 channels of values: o = o * alpha + weights @ qdata for R rows.  `first` is the byte of
// the first channel.
template <int R, Nibble nibble, bool Whole>
SACCADE_NOINLINE void weigh_channels(const char* const* values, int count, int first, int width,
                                     const IntegerWeights* p, const float* alpha, float* const* o,
                                     const PrefetchRows& prefetch) {
  __m512i acc[R][4];
  SACCADE_UNROLL for (int r = 0; r < R; ++r)
    SACCADE_UNROLL for (int n = 0; n < 4; ++n) acc[r][n] = _mm512_setzero_si512();
  const __m512i none = _mm512_setzero_si512();
  auto load_row = [&](int j) __attribute__((always_inline)) {
    __m512i x = load_bytes(values[j] + first, Whole ? 64 : width);
    if (nibble == Nibble::none) return x;
    if (nibble == Nibble::high) x = _mm512_srli_epi32(x, 4);
    return _mm512_and_si512(x, _mm512_set1_epi8(15));
  };
  for (int j = 0; j < count; j += 2) {  // an odd last key is followed by zeros of weight 0
    if (prefetch.rows && j + 2 <= prefetch.count)
      for (int64_t b = prefetch.begin; b < prefetch.end; b += 64) {
        __builtin_prefetch(prefetch.rows[j] + b, 0, 2);
        __builtin_prefetch(prefetch.rows[j + 1] + b, 0, 2);
      }
    const __m512i a = load_row(j), b = load_row(j + 1);
    const __m512i low = _mm512_unpacklo_epi8(a, b), up = _mm512_unpackhi_epi8(a, b);
    const __m512i pairs[4] = {_mm512_unpacklo_epi8(low, none), _mm512_unpackhi_epi8(low, none),
                              _mm512_unpacklo_epi8(up, none), _mm512_unpackhi_epi8(up, none)};
    SACCADE_UNROLL for (int r = 0; r < R; ++r) {
      int32_t two;
      std::memcpy(&two, p[r].weight + j, 4);
      const __m512i weight = _mm512_set1_epi32(two);
      SACCADE_UNROLL for (int n = 0; n < 4; ++n)
        acc[r][n] = _mm512_dpwssd_epi32(acc[r][n], pairs[n], weight);
    }
  }
  // Register n holds channels 16 L + 4 n .. + 3 in lane block L: a transpose of blocks sorts them.
  SACCADE_UNROLL for (int r = 0; r < R; ++r) {
    const __m512i t0 = _mm512_shuffle_i32x4(acc[r][0], acc[r][1], 0x44);
    const __m512i t1 = _mm512_shuffle_i32x4(acc[r][0], acc[r][1], 0xee);
    const __m512i t2 = _mm512_shuffle_i32x4(acc[r][2], acc[r][3], 0x44);
    const __m512i t3 = _mm512_shuffle_i32x4(acc[r][2], acc[r][3], 0xee);
    const __m512i sorted[4] = {
        _mm512_shuffle_i32x4(t0, t2, 0x88), _mm512_shuffle_i32x4(t0, t2, 0xdd),
        _mm512_shuffle_i32x4(t1, t3, 0x88), _mm512_shuffle_i32x4(t1, t3, 0xdd)};
    SACCADE_UNROLL for (int n = 0; n < 4; ++n) {
      if (n * W >= width) break;
      const int rest = width - n * W;
      const __mmask16 mask = rest >= W ? 0xffff : (__mmask16)((1 << rest) - 1);
      const F before = mul(_mm512_maskz_loadu_ps(mask, o[r] + n * W), set1(alpha[r]));
      _mm512_mask_storeu_ps(o[r] + n * W, mask, fma(to_float(sorted[n]), set1(p[r].step), before));
    }
  }
}

}  // namespace saccade::SACCADE_TARGET
#endif
