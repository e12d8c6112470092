// Products with quantized keys and values in integers, for 16-bit queries: four byte products or
// two 16-bit products a lane and instruction, where converting them to float would cost as much as
// the arithmetic.
//
// Queries (times the scales of a key group) become integers of 15 bits, written as hi * 128 + lo in
// two signed bytes, 0 <= lo < 128; weights (times the scale of a value) become integers of 16 bits.
// Their error, 2^-15 of the largest, is far below that of 16-bit floats.  Sums are exact in int32:
// at most 512 * 255 * 16256 or 576 * 255 * 14336 for keys, 128 keys * 255 * 32767 for values.
#pragma once
#include "tiles.h"

#if defined(SACCADE_DOT)
namespace saccade::SACCADE_TARGET {

struct IntegerQuery {
  // For 64 bytes of a key four registers, whose blocks of 128 bits each repeat four channels four
  // times: register i block L channels 16 L + 4 i to + 3 (interleave_keys).  Of 4-bit keys first
  // those of the low nibbles, then those of the high ones.  Where a key has at most 32 bytes, two
  // share a register, and the upper two blocks are the lower two again.
  alignas(64) int8_t hi[4 * (kDimPad + 128)], lo[4 * (kDimPad + 128)];
  float step;  // value of one unit
};

// The bytes of a query in the order of IntegerQuery; what follows the last channel meets zeros.
SACCADE_INLINE void repeat_channels(const int8_t* x, int dim, int bits, int8_t* out) {
  const int bytes = dim * bits / 8;
  for (int at = 0; at < bytes; at += 64)
    for (int first = at; first < dim; first += bytes, out += 256) {
      const __m512i q = bytes > 32 ? _mm512_loadu_si512(x + first)
                                   : _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(x + first)));
      _mm512_store_si512(out, _mm512_shuffle_epi32(q, (_MM_PERM_ENUM)0x00));
      _mm512_store_si512(out + 64, _mm512_shuffle_epi32(q, (_MM_PERM_ENUM)0x55));
      _mm512_store_si512(out + 128, _mm512_shuffle_epi32(q, (_MM_PERM_ENUM)0xaa));
      _mm512_store_si512(out + 192, _mm512_shuffle_epi32(q, (_MM_PERM_ENUM)0xff));
    }
}

// Queries times the scales of a key group as integers, and bias = q . offset.  What rounding leaves
// over joins the bias times the middle of the range, which halves the error.  Rows advance side by
// side, so that none waits for its own sums.  Everything is padded with zeros to full registers.
template <int R>
SACCADE_INLINE void queries_to_integers(const float* const* q, const float* scale,
                                        const float* offset, int dim, int bits,
                                        IntegerQuery* out, float* bias) {
  alignas(64) int8_t his[R][kDimPad + 64], los[R][kDimPad + 64];
  const float middle = bits == 8 ? 128.f : 8.f;
  const float units = dim <= 512 ? 16256.f : 14336.f;  // so that the sums of products fit 32 bits
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
    out[r].step = largest > 0.f ? largest / units : 1.f;
    inverse[r] = set1(1.f / out[r].step);
    step[r] = set1(-out[r].step);
  }
  for (int d = 0; d < dim; d += W)
    SACCADE_UNROLL for (int r = 0; r < R; ++r) {
      const F x = mul(load(q[r] + d), load(scale + d));
      const __m512i value = _mm512_cvtps_epi32(mul(x, inverse[r]));
      residue[r] = add(residue[r], fma(to_float(value), step[r], x));
      const __m512i hi = _mm512_srai_epi32(value, 7);
      const __m512i lo = _mm512_and_si512(value, _mm512_set1_epi32(127));
      _mm_storeu_si128((__m128i*)(his[r] + d), _mm512_cvtepi32_epi8(hi));
      _mm_storeu_si128((__m128i*)(los[r] + d), _mm512_cvtepi32_epi8(lo));
    }
  SACCADE_UNROLL for (int r = 0; r < R; ++r) {
    repeat_channels(his[r], dim, bits, out[r].hi);
    repeat_channels(los[r], dim, bits, out[r].lo);
  }
  SACCADE_UNROLL for (int r = 0; r < R; ++r)
    bias[r] = hsum(fma(residue[r], set1(middle), offset_sum[r]));
}

SACCADE_INLINE __m512i low_nibbles(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
SACCADE_INLINE __m512i high_nibbles(__m512i x) { return low_nibbles(_mm512_srli_epi32(x, 4)); }

SACCADE_INLINE __m512i load_bytes(const char* p, int n) {  // n of 64 bytes, the others 0
  return n >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((__mmask64(1) << n) - 1, p);
}

// Rows to prefetch meanwhile, `bytes` of each; null where there are none.
struct ComingRows {
  const char* const* rows;
  int64_t bytes;
};

constexpr int kKeysAtOnce = 8;

// n of 32 bytes of `a`, then as many of `b`, the others 0.
SACCADE_INLINE __m512i load_two(const char* a, const char* b, int n) {
  const __mmask32 mask = n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1;
  const auto load_half = [&](const char* p) { return _mm256_maskz_loadu_epi8(mask, p); };
  return _mm512_inserti64x4(_mm512_castsi256_si512(load_half(a)), load_half(b), 1);
}

// Four channels of each of four keys in every block of 128 bits: x[i] block L holds bytes
// 16 L + 4 i to + 3 of the keys; where two share a register, blocks 2 and 3 those of the next four.
template <bool kTwo>
SACCADE_INLINE void interleave_keys(const char* const* keys, int at, int rest, __m512i (&x)[4]) {
  __m512i k[4];
  SACCADE_UNROLL for (int i = 0; i < 4; ++i)
    k[i] = kTwo ? load_two(keys[i], keys[i + 4], rest) : load_bytes(keys[i] + at, rest);
  const __m512i a = _mm512_unpacklo_epi32(k[0], k[1]), b = _mm512_unpackhi_epi32(k[0], k[1]);
  const __m512i c = _mm512_unpacklo_epi32(k[2], k[3]), d = _mm512_unpackhi_epi32(k[2], k[3]);
  x[0] = _mm512_unpacklo_epi64(a, c);
  x[1] = _mm512_unpackhi_epi64(a, c);
  x[2] = _mm512_unpacklo_epi64(b, d);
  x[3] = _mm512_unpackhi_epi64(b, d);
}

// Sums of neighbouring blocks of 128 bits: keys 0-3 and 4-7 of the first row, then of the second.
SACCADE_INLINE __m512i sum_pairs(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// Sums over the four blocks of keys 0-3 (`a`) and 4-7 (`b`) of two rows, in the same order.
SACCADE_INLINE __m512i sum_blocks(const __m512i (&a)[2], const __m512i (&b)[2]) {
  __m512i half[2];
  SACCADE_UNROLL for (int r = 0; r < 2; ++r)
    half[r] = _mm512_add_epi32(_mm512_shuffle_i32x4(a[r], b[r], 0x44),
                               _mm512_shuffle_i32x4(a[r], b[r], 0xee));
  return sum_pairs(half[0], half[1]);
}

// Scores of R queries against eight quantized keys.  Four keys are interleaved within blocks of 128
// bits, so that only blocks are summed at the end.  kTwo: keys of at most 32 bytes.
template <int R, int Bits, bool kTwo>
SACCADE_NOINLINE void score_keys(const char* const* keys, int dim, const IntegerQuery* q,
                                 const float* bias, float* const* out, const ComingRows& coming) {
  constexpr int kRegisters = kTwo ? 1 : 2;  // of a channel of all eight keys
  const int bytes = dim * Bits / 8;
  __m512i hi[kRegisters][R], lo[kRegisters][R];
  SACCADE_UNROLL for (int g = 0; g < kRegisters; ++g)
    SACCADE_UNROLL for (int r = 0; r < R; ++r) hi[g][r] = lo[g][r] = _mm512_setzero_si512();
  int64_t prefetched = 0;
  for (int at = 0; at < bytes; at += 64) {
    const int rest = bytes - at < 64 ? bytes - at : 64;
    __m512i x[kRegisters][4];
    SACCADE_UNROLL for (int g = 0; g < kRegisters; ++g)
      interleave_keys<kTwo>(keys + 4 * g, at, rest, x[g]);
    SACCADE_UNROLL for (int i = 0; i < 4; ++i) {
      if (at < coming.bytes) {
        __builtin_prefetch(coming.rows[2 * i] + at, 0, 2);
        __builtin_prefetch(coming.rows[2 * i + 1] + at, 0, 2);
      }
      auto add_products = [&](auto part, int d) __attribute__((always_inline)) {
        __m512i numbers[kRegisters];
        SACCADE_UNROLL for (int g = 0; g < kRegisters; ++g) numbers[g] = part(x[g][i]);
        SACCADE_UNROLL for (int r = 0; r < R; ++r) {
          const __m512i high = _mm512_load_si512(q[r].hi + d + i * 64);
          const __m512i low = _mm512_load_si512(q[r].lo + d + i * 64);
          SACCADE_UNROLL for (int g = 0; g < kRegisters; ++g) {
            hi[g][r] = _mm512_dpbusd_epi32(hi[g][r], numbers[g], high);
            lo[g][r] = _mm512_dpbusd_epi32(lo[g][r], numbers[g], low);
          }
        }
      };
      if (Bits == 8) {
        add_products([](__m512i a) { return a; }, at * 4);
      } else {
        add_products([](__m512i a) { return low_nibbles(a); }, at * 8);
        add_products([](__m512i a) { return high_nibbles(a); }, at * 8 + 256);
      }
    }
    prefetched = at + 64;
  }
  for (; prefetched < coming.bytes; prefetched += 64)
    SACCADE_UNROLL for (int i = 0; i < kKeysAtOnce; ++i)
      __builtin_prefetch(coming.rows[i] + prefetched, 0, 2);
  SACCADE_UNROLL for (int g = 0; g < kRegisters; ++g)
    SACCADE_UNROLL for (int r = 0; r < R; ++r)
      hi[g][r] = _mm512_add_epi32(_mm512_slli_epi32(hi[g][r], 7), lo[g][r]);
  SACCADE_UNROLL for (int r = 0; r < R; r += 2) {
    const int s = r + 1 < R ? r + 1 : r;
    constexpr int kLast = kRegisters - 1;
    const F sums = to_float(kTwo ? sum_pairs(hi[0][r], hi[0][s])
                                 : sum_blocks({hi[0][r], hi[0][s]}, {hi[kLast][r], hi[kLast][s]}));
    const __mmask16 second = 0xff00;
    const F step = _mm512_mask_blend_ps(second, set1(q[r].step), set1(q[s].step));
    const F score = fma(sums, step, _mm512_mask_blend_ps(second, set1(bias[r]), set1(bias[s])));
    _mm256_storeu_ps(out[r], _mm512_castps512_ps256(score));
    if (s != r) _mm256_storeu_ps(out[s], _mm512_extractf32x8_ps(score, 1));
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
  bool even, odd;  // which rows
};

// Which part of a byte is a channel; `both`: 32 bytes are 64 channels, the low nibbles first.
enum class Nibble { none, low, high, both };

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
    if (nibble == Nibble::both) {
      const __m256i row = _mm256_loadu_si256((const __m256i*)(values[j] + first));
      const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(4), 1);
      return low_nibbles(_mm512_srlv_epi32(_mm512_broadcast_i64x4(row), shifts));
    }
    const __m512i x = load_bytes(values[j] + first, Whole ? 64 : width);
    if (nibble == Nibble::none) return x;
    return nibble == Nibble::high ? high_nibbles(x) : low_nibbles(x);
  };
  for (int j = 0; j < count; j += 2) {  // an odd last key is followed by zeros of weight 0
    if (prefetch.rows && j + 2 <= prefetch.count)
      for (int64_t b = prefetch.begin; b < prefetch.end; b += 64) {
        if (prefetch.even) __builtin_prefetch(prefetch.rows[j] + b, 0, 2);
        if (prefetch.odd) __builtin_prefetch(prefetch.rows[j + 1] + b, 0, 2);
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
