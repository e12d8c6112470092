// Packs a tile of stored keys and values into float32 panels, once for all queries that use it.
//
//   keys     panel of NR keys: [head_dim][NR], so that a micro-kernel reads NR keys of one channel
//   values   panel of NR channels: [keys][NR]
//
// 16-bit floats and quantized tokens are converted on the way.
#pragma once
#include <type_traits>

#include "tiles.h"

namespace saccade::SACCADE_TARGET {

// Rows of a tile as a source for packing: `get(rows, i, d)` loads channels d .. d+W-1 of row i.
template <class T>
struct FloatRows {
  const char* const* rows;
  SACCADE_INLINE F get(const FloatRows& s, int i, int d) { return load((const T*)s.rows[i] + d); }
  SACCADE_INLINE F get_part(const FloatRows& s, int i, int d, int n) {
    return load_part((const T*)s.rows[i] + d, n);
  }
};

// Transposes W rows into columns j .. j+W-1 of a key panel.
template <class Source>
SACCADE_INLINE void pack_key_columns(const Source& source, int first, int dim, float* panel,
                                     int width) {
  int d = 0;
  for (; d + W <= dim; d += W) {
    F r[W];
    SACCADE_UNROLL for (int i = 0; i < W; ++i) r[i] = Source::get(source, first + i, d);
    transpose(r);
    SACCADE_UNROLL for (int i = 0; i < W; ++i) store(panel + (int64_t)(d + i) * width, r[i]);
  }
  if (d < dim) {
    F r[W];
    SACCADE_UNROLL for (int i = 0; i < W; ++i)
      r[i] = Source::get_part(source, first + i, d, dim - d);
    transpose(r);
    alignas(64) float lanes[W * W];
    SACCADE_UNROLL for (int i = 0; i < W; ++i) store(lanes + i * W, r[i]);
    for (int i = 0; i < dim - d; ++i) store(panel + (int64_t)(d + i) * width, load(lanes + i * W));
  }
}

// Copies one row of values into its panels; returns x * 0 summed, NaN where x is not finite.
template <class Source, int NR>
SACCADE_INLINE F pack_value_row(const Source& source, int i, int dim, float* panels,
                                int64_t panel_size, F nan_probe) {
  for (int d = 0; d < dim; d += W) {
    F x = d + W <= dim ? Source::get(source, i, d) : Source::get_part(source, i, d, dim - d);
    store(panels + d / NR * panel_size + (int64_t)i * NR + d % NR, x);
    nan_probe = fma(x, zero(), nan_probe);
  }
  return nan_probe;
}

// The quantized channels of one token as bytes; low nibbles hold the first half of the head.
SACCADE_INLINE void unpack_bits(const uint8_t* qdata, int dim, int bits, uint8_t* bytes) {
  if (bits == 8) {
    std::memcpy(bytes, qdata, dim);
    return;
  }
  const int half = dim / 2;
  for (int d = 0; d < half; ++d) {
    bytes[d] = qdata[d] & 15;
    bytes[d + half] = qdata[d] >> 4;
  }
}

// Channels d .. d + W - 1 of a quantized token, for heads of full pairs of registers.
SACCADE_INLINE F quantized_part(const uint8_t* qdata, int dim, int bits, int d) {
  if (bits == 8) return load(qdata + d);
  const int half = dim / 2;
  F low, high;
  load_nibbles(qdata + (d < half ? d : d - half), low, high);
  return d < half ? low : high;
}

// A row as float32 times a factor; `x` has room for full registers.
template <class T>
static void widen(const T* row, int dim, float factor, float* x) {
  for (int d = 0; d < dim; d += W) {
    const F part = d + W <= dim ? load(row + d) : load_part(row + d, dim - d);
    store(x + d, mul(part, set1(factor)));
  }
}

// x = qdata * scale + offset along a row whose scale and offset are rows too (keys).
SACCADE_INLINE void dequantize_row(const uint8_t* qdata, int bits, const float* scale,
                                   const float* offset, int dim, float* x) {
  if (dim % (2 * W) == 0) {
    for (int d = 0; d < dim; d += W)
      store(x + d, fma(quantized_part(qdata, dim, bits, d), load(scale + d), load(offset + d)));
    return;
  }
  alignas(64) uint8_t bytes[kDimPad];
  unpack_bits(qdata, dim, bits, bytes);
  for (int d = 0; d < dim; d += W)  // rows are padded to full registers
    store(x + d, fma(load(bytes + d), load(scale + d), load(offset + d)));
}

// Any float dtype as float32, times a factor.
SACCADE_INLINE void widen_row(Dtype dtype, const char* row, int dim, float factor, float* x) {
  switch (dtype) {
    case Dtype::f32: return widen((const float*)row, dim, factor, x);
    case Dtype::bf16: return widen((const Bf16*)row, dim, factor, x);
    default: return widen((const F16*)row, dim, factor, x);
  }
}

SACCADE_INLINE void load_half_row(const char* row, int n, float* x) {
  const F16* p = (const F16*)row;
  int d = 0;
  for (; d + W <= n; d += W) store(x + d, load(p + d));
  if (n - d == 1) {  // a copy of known size, since most values have a single scale
    const F16 one[W] = {p[d]};
    store(x + d, load(one));
  } else if (d < n) store(x + d, load_part(p + d, n - d));
}

// Float32 rows of the quantized keys `first` .. `first + count - 1` of a tile.
SACCADE_INLINE void dequantize_keys(const QuantizedTensor& c, int64_t scales, int64_t offsets,
                                    const Tile& tile, int first, int count, int dim, float* out,
                                    float* scale, float* offset, int64_t& group) {
  for (int i = 0; i < count; ++i) {
    const int j = first + i;
    float* row = out + (int64_t)i * kDimPad;
    if (j >= tile.count || tile.positions[j] == kNoKey) {
      std::memset(row, 0, dim * sizeof(float));
      continue;
    }
    const int64_t of = tile.token[j] / c.group;
    if (of != group) {
      group = of;
      load_half_row(c.scale.data + scales + of * c.scale.row, dim, scale);
      load_half_row(c.offset.data + offsets + of * c.offset.row, dim, offset);
    }
    dequantize_row((const uint8_t*)tile.k[j], c.bits, scale, offset, dim, row);
  }
}

// Float32 row of one quantized value, whose scale holds for `group` channels.
SACCADE_INLINE void dequantize_value(const QuantizedTensor& c, int64_t scales, int64_t offsets,
                                     const Tile& tile, int j, int dim, float* x) {
  alignas(64) uint8_t bytes[kDimPad];
  alignas(64) float scale[kDimPad], offset[kDimPad];
  const int groups = dim / (int)c.group;
  load_half_row(c.scale.data + scales + tile.token[j] * c.scale.row, groups, scale);
  load_half_row(c.offset.data + offsets + tile.token[j] * c.offset.row, groups, offset);
  const uint8_t* qdata = (const uint8_t*)tile.v[j];
  if (c.group % W == 0 && dim % (2 * W) == 0) {
    for (int d = 0, g = 0; d < dim; d += W) {
      g += d == (g + 1) * (int)c.group;
      store(x + d, fma(quantized_part(qdata, dim, c.bits, d), set1(scale[g]), set1(offset[g])));
    }
    return;
  }
  unpack_bits(qdata, dim, c.bits, bytes);
  if (c.group % W == 0) {
    for (int g = 0; g < groups; ++g)
      for (int d = g * (int)c.group; d < (g + 1) * (int)c.group; d += W)
        store(x + d, fma(load(bytes + d), set1(scale[g]), set1(offset[g])));
    return;
  }
  for (int d = 0; d < dim; ++d) x[d] = bytes[d] * scale[d / c.group] + offset[d / c.group];
}

// Packs the keys and values of tiles for one (batch row, KV head).
template <int NR>
class Packer {
 public:
  Packer(const Problem& problem, int64_t batch, int64_t head)
      : p_(problem), k_scale_(at(problem.kv.quantized_k.scale, batch, head)),
        k_offset_(at(problem.kv.quantized_k.offset, batch, head)),
        v_scale_(at(problem.kv.quantized_v.scale, batch, head)),
        v_offset_(at(problem.kv.quantized_v.offset, batch, head)) {}

  // Key panels [ceil(count / NR)][head_dim][NR].
  void keys(const Tile& tile, float* panels) {
    if (tile.quantized) return quantized_keys(tile, panels);
    switch (p_.kv.k.dtype) {
      case Dtype::f32: return keys_from(FloatRows<float>{tile.k}, tile, panels);
      case Dtype::bf16: return keys_from(FloatRows<Bf16>{tile.k}, tile, panels);
      default: return keys_from(FloatRows<F16>{tile.k}, tile, panels);
    }
  }

  // Value panels [ceil(value_dim / NR)][kTile][NR]; returns whether all values are finite.
  bool values(const Tile& tile, float* panels) {
    F nan_probe = zero();
    if (tile.quantized) {
      nan_probe = quantized_values(tile, panels);
    } else {
      switch (p_.kv.v.dtype) {
        case Dtype::f32: nan_probe = values_from(FloatRows<float>{tile.v}, tile, panels); break;
        case Dtype::bf16: nan_probe = values_from(FloatRows<Bf16>{tile.v}, tile, panels); break;
        default: nan_probe = values_from(FloatRows<F16>{tile.v}, tile, panels);
      }
    }
    return hsum(nan_probe) == 0.f;
  }

  // Any rows as panels [ceil(dim / NR)][panel_rows][NR].
  static void rows(const char* const* data, Dtype dtype, int count, int dim, float* panels,
                   int panel_rows) {
    auto pack = [&](const auto& source) {
      using Source = std::remove_cvref_t<decltype(source)>;
      for (int i = 0; i < count; ++i)
        pack_value_row<Source, NR>(source, i, dim, panels, (int64_t)panel_rows * NR, zero());
      for (int i = count; i < (count + NR - 1) / NR * NR; ++i)  // products with padding are 0
        for (int d = 0; d < dim; d += NR)
          std::memset(panels + (int64_t)(d / NR) * panel_rows * NR + i * NR, 0, NR * sizeof(float));
    };
    with_source(data, dtype, pack);
  }

  // Any rows, transposed: panels [ceil(count / NR)][dim][NR].
  static void columns(const char* const* data, Dtype dtype, int count, int dim, float* panels) {
    with_source(data, dtype, [&](const auto& source) {
      for (int j = 0; j < (count + NR - 1) / NR * NR; j += W)
        pack_key_columns(source, j, dim, panels + (int64_t)(j / NR) * NR * dim + j % NR, NR);
    });
  }

 private:
  template <class Use>
  static void with_source(const char* const* data, Dtype dtype, Use&& use) {
    switch (dtype) {
      case Dtype::f32: return use(FloatRows<float>{data});
      case Dtype::bf16: return use(FloatRows<Bf16>{data});
      default: return use(FloatRows<F16>{data});
    }
  }

  static int64_t at(const Strided& s, int64_t batch, int64_t head) {
    return batch * s.batch + head * s.head;
  }

  template <class Source>
  void keys_from(const Source& source, const Tile& tile, float* panels) {
    const int dim = (int)p_.head_dim, padded = (tile.count + NR - 1) / NR * NR;
    for (int j = 0; j < padded; j += W)
      pack_key_columns(source, j, dim, panels + (int64_t)(j / NR) * NR * dim + j % NR, NR);
  }

  void quantized_keys(const Tile& tile, float* panels) {
    const int dim = (int)p_.head_dim, padded = (tile.count + NR - 1) / NR * NR;
    alignas(64) float rows[W * kDimPad], scale[kDimPad], offset[kDimPad];
    const char* row_of[W];
    for (int i = 0; i < W; ++i) row_of[i] = (const char*)(rows + i * kDimPad);
    int64_t group = -1;
    for (int j = 0; j < padded; j += W) {
      dequantize_keys(p_.kv.quantized_k, k_scale_, k_offset_, tile, j, W, dim, rows, scale, offset,
                      group);
      pack_key_columns(FloatRows<float>{row_of}, 0, dim,
                       panels + (int64_t)(j / NR) * NR * dim + j % NR, NR);
    }
  }

  template <class Source>
  F values_from(const Source& source, const Tile& tile, float* panels) {
    F nan_probe = zero();
    for (int i = 0; i < tile.count; ++i)
      nan_probe = pack_value_row<Source, NR>(source, i, (int)p_.value_dim, panels, kTile * NR,
                                             nan_probe);
    return nan_probe;
  }

  F quantized_values(const Tile& tile, float* panels) {
    alignas(64) float row[kDimPad];
    F nan_probe = zero();
    const int dim = (int)p_.value_dim;
    for (int j = 0; j < tile.count; ++j) {
      if (tile.positions[j] == kNoKey) {
        std::memset(row, 0, sizeof row);
      } else {
        dequantize_value(p_.kv.quantized_v, v_scale_, v_offset_, tile, j, dim, row);
      }
      const char* here = (const char*)row;
      FloatRows<float> source{&here};
      nan_probe = pack_value_row<FloatRows<float>, NR>(source, 0, dim, panels + (int64_t)j * NR,
                                                   kTile * NR, nan_probe);
    }
    return nan_probe;
  }

  const Problem& p_;
  int64_t k_scale_, k_offset_, v_scale_, v_offset_;
};

}  // namespace saccade::SACCADE_TARGET
