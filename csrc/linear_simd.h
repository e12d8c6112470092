// Loading packed numbers into registers of W floats, for the target this file is compiled for.
#pragma once
#include "intmath.h"
#include "linear.h"

namespace saccade::SACCADE_TARGET {

SACCADE_INLINE int64_t num_blocks(const PackedMatrix& w) { return ceil_div(w.out, kBlockRows); }
SACCADE_INLINE const uint8_t* block_data(const PackedMatrix& w, int64_t block) {
  return w.qdata + block * (w.in * kBlockRows * w.bits / 8);
}
// Of the scales and minima of a block.
SACCADE_INLINE int64_t block_scales(const PackedMatrix& w, int64_t block) {
  return block * (w.in / w.group) * kBlockRows;
}

#if defined(SACCADE_AVX512)
SACCADE_INLINE F load_signed(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
// Lane by lane, 4 bits of 32 as a number: a table of sixteen reads no more of its index.
struct NibbleTable {
  F values;
  explicit NibbleTable(int centre) {
    values = sub(_mm512_cvtepi32_ps(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
                                                      14, 15)),
                 set1((float)centre));
  }
  SACCADE_INLINE_MEMBER F get(I x, int shift) const {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(x, (unsigned)shift), values);
  }
};
// Sixteen times 2 bits of 32; the table is the same whatever the two bits above them are.
struct UpperTable {
  F values = mul(NibbleTable(0).get(_mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2,
                                                      3), 0),
                 set1(16.f));
  SACCADE_INLINE_MEMBER F get(I x, int shift) const {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(x, (unsigned)shift), values);
  }
};
#else
#if defined(SACCADE_AVX2)
SACCADE_INLINE F load_signed(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
SACCADE_INLINE I some_bits(I x, int shift, int mask) {
  return _mm256_and_si256(_mm256_srli_epi32(x, shift), _mm256_set1_epi32(mask));
}
#elif defined(SACCADE_NEON)
SACCADE_INLINE F load_signed(const int8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
SACCADE_INLINE I some_bits(I x, int shift, int mask) {
  const uint32x4_t shifted = vshlq_u32(vreinterpretq_u32_s32(x), vdupq_n_s32(-shift));
  return vreinterpretq_s32_u32(vandq_u32(shifted, vdupq_n_u32((uint32_t)mask)));
}
#else
SACCADE_INLINE F load_signed(const int8_t* p) {
  F r;
  for (int i = 0; i < W; ++i) r.lane[i] = (float)p[i];
  return r;
}
SACCADE_INLINE I some_bits(I x, int shift, int mask) {
  I r;
  for (int i = 0; i < W; ++i)
    r.lane[i] = (int32_t)((uint32_t)x.lane[i] >> shift & (uint32_t)mask);
  return r;
}
#endif
struct NibbleTable {
  I centre;
  explicit NibbleTable(int value) { centre = set1i(value); }
  SACCADE_INLINE_MEMBER F get(I x, int shift) const {
    return to_float(subi(some_bits(x, shift, 15), centre));
  }
};
struct UpperTable {
  SACCADE_INLINE_MEMBER F get(I x, int shift) const {
    return mul(to_float(some_bits(x, shift, 3)), set1(16.f));
  }
};
#endif

// Bits from the lowest to the nibble of column c of eight, and to the upper two bits of sixteen.
SACCADE_INLINE constexpr int nibble_place(int c) { return (c & 1) * 16 + (c >> 1) * 4; }
SACCADE_INLINE constexpr int upper_place(int c) { return (c & 1) * 16 + (c >> 1) * 2; }

// What is subtracted from numbers without a sign.
SACCADE_INLINE int centre_of(const PackedMatrix& w) {
  return w.minimum || w.bits == 8 ? 0 : 1 << (w.bits - 1);
}

constexpr int kColumns = 16;  // that are read at once: the least common unit of all forms

template <int Bits>
SACCADE_INLINE constexpr int64_t bytes_at_once() {
  return kColumns * kBlockRows * Bits / 8;
}

// Numbers of a block before they are scaled.
template <int Bits>
class Columns {
 public:
  explicit Columns(const PackedMatrix& w) : nibbles_(centre_of(w)) {}

  // Column c of the sixteen at q, rows `lane` on.
  SACCADE_INLINE_MEMBER F get(const uint8_t* q, int lane, int c) const {
    if (Bits == 8) return load_signed((const int8_t*)q + c * kBlockRows + lane);
    const int32_t* rows = (const int32_t*)q + lane;
    const F low = nibbles_.get(loadi(rows + c / 8 * kBlockRows), nibble_place(c & 7));
    if (Bits == 4) return low;
    return add(low, upper_.get(loadi(rows + 2 * kBlockRows), upper_place(c)));
  }

 private:
  NibbleTable nibbles_;
  UpperTable upper_;
};

// fn.operator()<Bits>() for the bits of a weight.
template <class Fn>
SACCADE_INLINE auto for_bits(int bits, Fn&& fn) {
  if (bits == 4) return fn.template operator()<4>();
  if (bits == 6) return fn.template operator()<6>();
  return fn.template operator()<8>();
}

SACCADE_INLINE F load_any(const char* p, Dtype dtype, int64_t at) {
  if (dtype == Dtype::f32) return load((const float*)p + at);
  if (dtype == Dtype::bf16) return load((const Bf16*)p + at);
  return load((const F16*)p + at);
}

// The first n <= W of them.
SACCADE_INLINE F load_some(const char* p, Dtype dtype, int64_t at, int64_t n) {
  if (n == W) return load_any(p, dtype, at);
  if (dtype == Dtype::f32) return load_part((const float*)p + at, (int)n);
  if (dtype == Dtype::bf16) return load_part((const Bf16*)p + at, (int)n);
  return load_part((const F16*)p + at, (int)n);
}

template <class T>
SACCADE_INLINE void store_as(const float* x, T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    if (n - i >= W) store(p + i, load(x + i));
    else store_part(p + i, load_part(x + i, (int)(n - i)), (int)(n - i));
  }
}

// n floats as numbers of a dtype.
SACCADE_INLINE void store_any(const float* x, char* p, Dtype dtype, int64_t n) {
  if (dtype == Dtype::f32) store_as(x, (float*)p, n);
  else if (dtype == Dtype::bf16) store_as(x, (Bf16*)p, n);
  else store_as(x, (F16*)p, n);
}

}  // namespace saccade::SACCADE_TARGET
