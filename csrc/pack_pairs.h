// Packs a tile of stored keys and values as pairs of bfloat16, which the dot products of AVX-512
// and the matrix tiles of AMX both multiply and add:
//
//   keys     panel of 32 keys: [depth / 2][32][2], pairs of neighbouring channels
//   values   panel of 32 channels: [keys / 2][32][2], pairs of neighbouring keys
//
// What exceeds the head or the tile is filled with zeros.  With two parts a number is the sum of
// two bfloat16, which holds a float16 exactly and a float32 to 16 bits; the second parts are panels
// of their own behind those of the first.
#pragma once
#include <type_traits>

#include "micro_kernel.h"
#include "pack.h"

#if defined(SACCADE_DOT)
namespace saccade::SACCADE_TARGET {

constexpr int kPair = 2 * W;  // bfloat16 of a register, and keys or channels of a panel
static_assert(kPair == kColumns);

SACCADE_INLINE __mmask32 first_lanes(int n) { return n >= kPair ? ~0u : (1u << n) - 1; }

// Parts of 2 W numbers.  An infinite number has no second part: inf - inf would be NaN.
template <int Parts>
SACCADE_INLINE void split_into_parts(F a, F b, __m512i* out) {
  out[0] = round_pairs(a, b);
  if constexpr (Parts == 2) {
    F low, high;
    widen_pairs(out[0], low, high);
    auto rest = [](F x, F rounded) {
      return select(lt(abs(rounded), set1(kInf)), sub(x, rounded), zero());
    };
    out[1] = round_pairs(rest(a, low), rest(b, high));
  }
}

// Channels d .. d + 31 of a row of which the first n exist, in parts.
template <int Parts, class T>
SACCADE_INLINE void get_pairs(const T* row, int n, __m512i* out) {
  if constexpr (std::is_same_v<T, Bf16>) {
    out[0] = _mm512_maskz_loadu_epi16(first_lanes(n), row);
    if constexpr (Parts == 2) out[1] = _mm512_setzero_si512();
  } else {
    const F a = n >= W ? load(row) : load_part(row, n);
    const F b = n >= kPair ? load(row + W) : n > W ? load_part(row + W, n - W) : zero();
    split_into_parts<Parts>(a, b, out);
  }
}

SACCADE_INLINE bool has_infinite(__m512i pairs) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent) != 0;
}

// (a0, b0), (a1, b1), ...: the first sixteen pairs, then the others.
SACCADE_INLINE void interleave(__m512i a, __m512i b, Bf16* out) {
  alignas(64) static constexpr uint16_t kFirst[kPair] = {
      0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kFirst);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, first, b));
  _mm512_storeu_si512(out + kPair, _mm512_permutex2var_epi16(a, second, b));
}

template <int Parts>
class PairPacker {
 public:
  // `depth`: channels of a key panel, at least the head.
  PairPacker(const Problem& problem, int64_t batch, int64_t head, int depth)
      : p_(problem), batch_(batch), head_(head), depth_(depth) {}

  // Key panels [parts][kTile / 32][depth / 2][32][2]; returns whether all keys are finite.
  bool keys(const Tile& tile, Bf16* panels) {
    finite_ = true;
    if (tile.quantized) {
      quantized_keys(tile, panels);
    } else {
      with_type(p_.kv.k.dtype, [&]<class T>() {
        for (int j = 0; j < padded(tile.count); j += W)
          sixteen_keys<T>(tile.k + j, panels + j / kPair * depth_ * kPair + j % kPair * 2);
      });
    }
    return finite_;
  }

  // Value panels [parts][ceil(value_dim / 32)][kTile / 2][32][2]; returns the same of values.
  bool values(const Tile& tile, Bf16* panels) {
    finite_ = true;
    if (tile.quantized) {
      quantized_values(tile, panels);
    } else {
      with_type(p_.kv.v.dtype, [&]<class T>() {
        for (int j = 0; j < padded(tile.count); j += 2)
          two_values((const T*)tile.v[j], (const T*)tile.v[j + 1], panels + j * kPair);
      });
    }
    return finite_;
  }

 private:
  static int padded(int count) { return (int)ceil_div(count, kPair) * kPair; }

  template <class Use>
  static void with_type(Dtype dtype, Use&& use) {
    switch (dtype) {
      case Dtype::f32: return use.template operator()<float>();
      case Dtype::bf16: return use.template operator()<Bf16>();
      default: return use.template operator()<F16>();
    }
  }

  // Transposes pairs of sixteen keys into every channel of a panel.
  template <class T>
  void sixteen_keys(const char* const* rows, Bf16* panel) {
    const int dim = (int)p_.head_dim;
    for (int d = 0; d < depth_; d += kPair) {
      F r[Parts][W];
      SACCADE_UNROLL for (int i = 0; i < W; ++i) {
        __m512i parts[Parts];
        get_pairs<Parts>((const T*)rows[i] + d, dim - d, parts);
        if (Parts == 2 && has_infinite(parts[0])) finite_ = false;
        SACCADE_UNROLL for (int part = 0; part < Parts; ++part)
          r[part][i] = _mm512_castsi512_ps(parts[part]);
      }
      const int pairs = depth_ - d < kPair ? (depth_ - d) / 2 : W;
      SACCADE_UNROLL for (int part = 0; part < Parts; ++part) {
        transpose(r[part]);
        Bf16* out = panel + (int64_t)part * kTile * depth_ + d * kPair;
        if (pairs == W) {
          SACCADE_UNROLL for (int i = 0; i < W; ++i)
            _mm512_storeu_ps(out + i * 2 * kPair, r[part][i]);
        } else {
          alignas(64) F rest[W];
          SACCADE_UNROLL for (int i = 0; i < W; ++i) rest[i] = r[part][i];
          for (int i = 0; i < pairs; ++i) _mm512_storeu_ps(out + i * 2 * kPair, rest[i]);
        }
      }
    }
  }

  template <class T>
  void two_values(const T* a, const T* b, Bf16* panels) {
    const int dim = (int)p_.value_dim;
    const int64_t part_size = ceil_div(dim, kPair) * kTile * kPair;
    for (int d = 0; d < dim; d += kPair, panels += kTile * kPair) {
      __m512i x[Parts], y[Parts];
      get_pairs<Parts>(a + d, dim - d, x);
      get_pairs<Parts>(b + d, dim - d, y);
      finite_ &= !has_infinite(x[0]) && !has_infinite(y[0]);
      SACCADE_UNROLL for (int part = 0; part < Parts; ++part)
        interleave(x[part], y[part], panels + part * part_size);
    }
  }

  void quantized_keys(const Tile& tile, Bf16* panels) {
    const int dim = (int)p_.head_dim;
    alignas(64) float rows[W * kDimPad], scale[kDimPad], offset[kDimPad];
    const char* row_of[W];
    for (int i = 0; i < W; ++i) row_of[i] = (const char*)(rows + i * kDimPad);
    int64_t group = -1;
    for (int j = 0; j < padded(tile.count); j += W) {
      dequantize_keys(p_.kv.quantized_k, at(p_.kv.quantized_k.scale), at(p_.kv.quantized_k.offset),
                      tile, j, W, dim, rows, scale, offset, group);
      sixteen_keys<float>(row_of, panels + j / kPair * depth_ * kPair + j % kPair * 2);
    }
  }

  void quantized_values(const Tile& tile, Bf16* panels) {
    alignas(64) float a[kDimPad], b[kDimPad];
    for (int j = 0; j < padded(tile.count); j += 2) {
      dequantize_or_zero(tile, j, a);
      dequantize_or_zero(tile, j + 1, b);
      two_values(a, b, panels + j * kPair);
    }
  }

  void dequantize_or_zero(const Tile& tile, int j, float* x) {
    const QuantizedTensor& v = p_.kv.quantized_v;
    if (j >= tile.count || tile.positions[j] == kNoKey) {
      std::memset(x, 0, kDimPad * sizeof(float));
    } else {
      dequantize_value(v, at(v.scale), at(v.offset), tile, j, (int)p_.value_dim, x);
    }
  }

  int64_t at(const Strided& s) const { return batch_ * s.batch + head_ * s.head; }

  const Problem& p_;
  int64_t batch_, head_;
  int depth_;
  bool finite_ = true;
};

}  // namespace saccade::SACCADE_TARGET
#endif
