// Decoding over quantized keys and values, which are never dequantized: the scales of a key group
// are folded into the queries and those of a value into its weight.
//
//     q . (qdata * scale + offset)      = (q * scale) . qdata + q . offset
//     sum p * (qdata * scale + offset)  = sum (p * scale) * qdata + sum p * offset
#pragma once
#include "decode_plain.h"
#include "integer_dot.h"

namespace saccade::SACCADE_TARGET {

class DecodeQuantized : protected DecodePlain {
 protected:
  DecodeQuantized(const Problem& p, const Partials& partials) : DecodePlain(p, partials) {
#if defined(SACCADE_DOT)
    const bool whole = p_.head_dim * p_.kv.quantized_k.bits % 32 == 0;
    integer_dot_ = p_.kv.kind == ViewKind::quantized && p_.q.dtype != Dtype::f32 && whole;
#endif
  }

  // The first key from `begin` on that is not before token `stop`; tokens of a tile ascend.
  int end_of_group(int begin, int64_t stop) const {
    const int64_t* token = tile_->token;
    const int last = tile_->count - 1;
    if (token[last] - token[begin] == last - begin)
      return (int)min(last + 1, begin + stop - token[begin]);
    int end = begin + 1;
    while (end <= last && token[end] < stop) ++end;
    return end;
  }

  template <class Source, int R>
  void score_quantized(int row) {
    const QuantizedTensor& c = p_.kv.quantized_k;
    for (int begin = 0; begin < tile_->count;) {
      const int64_t group = tile_->token[begin] / c.group;
      const int end = end_of_group(begin, (group + 1) * c.group);
#if defined(SACCADE_DOT)
      if (integer_dot_) {
        for_live_rows<R>(row, [&]<int Live>() {
          score_in_integers<Live>(row, group, begin, end);
        });
        begin = end;
        continue;
      }
#endif
      scale_queries<Source, R>(row, group);
      // Full blocks of keys are computed; those from `end` on are overwritten by the next group.
      const int length = (int)p_.head_dim / Source::kParts;
      dot<Source, R>(scaled_q_[0], kDimPad, length, row, begin, end);
      for (int r = 0; r < R; ++r)
        for (int j = begin; j < end; ++j) scores_[row + r][j] += bias_[r];
      begin = end;
    }
  }

  // scaled_q = q * scale in the order of the chunks, bias = q . offset.
  template <class Source, int R>
  void scale_queries(int row, int64_t group) {
    constexpr int parts = Source::kParts;
    const QuantizedTensor& c = p_.kv.quantized_k;
    const int dim = (int)p_.head_dim, length = dim / parts;
    alignas(64) float scale[kDimPad], offset[kDimPad];
    load_half_row(scale_row(c.scale, group), dim, scale);
    load_half_row(scale_row(c.offset, group), dim, offset);
    for (int r = 0; r < R; ++r) {
      const float* q = q_[row + r];
      F bias = zero();
      for (int d = 0; d < dim; d += W) bias = fma(load(q + d), load(offset + d), bias);
      bias_[r] = hsum(bias);
      for (int chunk = 0; chunk * W < length; ++chunk)
        for (int part = 0; part < parts; ++part) {
          const int d = part * length + chunk * W, n = length - chunk * W;
          F x = mul(load(q + d), load(scale + d));
          if (n < W) x = load_part(lanes_of(x), n);
          store(scaled_q_[r] + (chunk * parts + part) * W, x);
        }
    }
  }

  const float* lanes_of(F x) {
    store(lanes_, x);
    return lanes_;
  }

  const char* scale_row(const Strided& s, int64_t row) const {
    return s.data + sequence_->batch * s.batch + item_->head * s.head + row * s.row;
  }

  // Scales of the values of the tile, transposed to [group][key].
  void prepare_values(bool values_finite) {
    const QuantizedTensor& c = p_.kv.quantized_v;
    num_groups_ = (int)(p_.value_dim / c.group);
    values_by_group_ = num_groups_ <= kMaxGroups && c.group % W == 0 && values_finite &&
                       (c.bits == 8 || (p_.value_dim / 2) % W == 0);
    if (!values_by_group_) return;
    read_value_scales(c.scale, v_scale_);
    read_value_scales(c.offset, v_offset_);
  }

  // float16 [key][group] as float32 [group][key].
  void read_value_scales(const Strided& s, float (*out)[kTile]) {
    alignas(64) float x[kTile * kMaxGroups + W];
    const int n = num_groups_, count = tile_->count;
    const bool run = tile_->token[count - 1] - tile_->token[0] == count - 1;
    if (run && s.row == n * (int64_t)sizeof(F16)) {
      load_half_row(scale_row(s, tile_->token[0]), n * count, x);
    } else {
      for (int j = 0; j < count; ++j) load_half_row(scale_row(s, tile_->token[j]), n, x + j * n);
    }
    switch (n) {  // known strides become shuffles
      case 1: std::memcpy(out[0], x, count * sizeof(float)); break;
      case 2: transpose_scales<2>(x, out); break;
      case 4: transpose_scales<4>(x, out); break;
      default:
        for (int g = 0; g < n; ++g)
          for (int j = 0; j < count; ++j) out[g][j] = x[j * n + g];
    }
    for (int g = 0; g < n; ++g) {
      if (tile_->holes)
        for (int j = 0; j < count; ++j)
          if (tile_->positions[j] == kNoKey) out[g][j] = 0.f;
      for (int j = count; j < padded_count(); ++j) out[g][j] = 0.f;
    }
  }

  template <int N>
  void transpose_scales(const float* x, float (*out)[kTile]) {
    for (int g = 0; g < N; ++g)
      for (int j = 0; j < kTile; ++j) out[g][j] = x[j * N + g];
  }

  // Weights times scales for each group of channels, and the offsets once for a group.
  template <class Source, int R>
  void accumulate_quantized(int row) {
    constexpr int parts = Source::kParts;
    const int dim = (int)p_.value_dim, half = dim / parts, group = (int)p_.kv.quantized_v.group;
    float offset_sums[kMaxGroups][R];
    for (int g = 0; g < num_groups_; ++g) scale_weights<R>(row, g, offset_sums[g]);
#if defined(SACCADE_DOT)
    if (integer_dot_)
      for_live_rows<R>(row, [&]<int Live>() {
        accumulate_in_integers<Live, Source::kParts == 2 ? 4 : 8>(row);
      });
    for (int d = integer_dot_ ? half : 0; d < half;) {
#else
    for (int d = 0; d < half;) {
#endif
      int stop = half;  // up to where no part changes its group
      for (int part = 0; part < parts; ++part) {
        const int next = ((part * half + d) / group + 1) * group - part * half;
        stop = next < stop ? next : stop;
      }
      const float* weights[R][parts];
      for (int r = 0; r < R; ++r)
        for (int part = 0; part < parts; ++part)
          weights[r][part] = scaled_weights_[(part * half + d) / group][r];
      constexpr int vectors = most_vectors<Source, R>();
      for (; d + vectors * W <= stop; d += vectors * W)
        add_values<Source, R, vectors>(row, d, weights);
      for (; d < stop; d += W) add_values<Source, R, 1>(row, d, weights);
    }
    for (int g = 0; g < num_groups_; ++g)
      for (int r = 0; r < R; ++r)
        for (int d = g * group; d < (g + 1) * group; d += W) {
          float* o = o_[row + r] + d;
          store(o, add(load(o), set1(offset_sums[g][r])));
        }
  }

  template <int R>
  void scale_weights(int row, int g, float* offset_sums) {
    const int end = padded_count();
    for (int r = 0; r < R; ++r) {
      F offset = zero();
      for (int j = 0; j < end; j += W) {
        const F p = load(scores_[row + r] + j);
        store(scaled_weights_[g][r] + j, mul(p, load(v_scale_[g] + j)));
        offset = fma(p, load(v_offset_[g] + j), offset);
      }
      offset_sums[r] = hsum(offset);
    }
  }

  bool values_by_group_ = false;  // weights are multiplied by the scales of each group of channels

 private:
#if defined(SACCADE_DOT)
  // Three rows are computed as four elsewhere; here the fourth would cost as much as the others.
  template <int R, class Fn>
  void for_live_rows(int row, Fn&& fn) const {
    if (R == 4 && num_rows_ - row == 3) return fn.template operator()<3>();
    fn.template operator()<R>();
  }

  // score_quantized in integers, a few keys at a time.
  template <int R>
  void score_in_integers(int row, int64_t group, int begin, int end) {
    const QuantizedTensor& c = p_.kv.quantized_k;
    const int dim = (int)p_.head_dim;
    alignas(64) float scale[kDimPad], offset[kDimPad];
    load_half_row(scale_row(c.scale, group), dim, scale);
    load_half_row(scale_row(c.offset, group), dim, offset);
    if (row == 0 && begin == 0) prefetch_scales();
    const float* q[R];
    float* out[R];
    for (int r = 0; r < R; ++r) {
      q[r] = q_[row + r];
      out[r] = scores_[row + r];
    }
    queries_to_integers<R>(q, scale, offset, dim, c.bits, int_q_, bias_);
    for (int j = begin; j < end; j += kKeysAtOnce) {
      float* at[R];
      for (int r = 0; r < R; ++r) at[r] = out[r] + j;
      const bool coming = row == 0 && j + kKeysAtOnce <= tile_->count;
      const ComingRows values{tile_->v + j, coming ? v_bytes_ : 0};
      const auto score = c.bits == 8
                             ? (dim <= 32 ? score_keys<R, 8, true> : score_keys<R, 8, false>)
                             : (dim <= 64 ? score_keys<R, 4, true> : score_keys<R, 4, false>);
      score(tile_->k + j, dim, int_q_, bias_, at, values);
    }
  }

  // accumulate_in_integers where the 64 channels of a value share a scale and a register.
  template <int R>
  void accumulate_both_nibbles(int row) {
    float* o[R];
    for (int r = 0; r < R; ++r) o[r] = o_[row + r];
    const PrefetchRows prefetch{row == 0 ? next_->k : nullptr, next_->count, 0, k_bytes_, true, true};
    weigh_channels<R, Nibble::both, true>(tile_->v, tile_->count, 0, 64, int_p_[0], alpha_ + row, o,
                                          prefetch);
  }

  // Scales of the next tile: read once a tile, too far apart for the hardware prefetcher, and needed
  // at once, so that a shorter distance would leave their latency to be waited for; few enough for L1.
  void prefetch_scales() const {
    constexpr int kToL1 = 3;
    if (next_->count == 0 || !next_->quantized) return;
    const int64_t first = next_->token[0], last = next_->token[next_->count - 1];
    const int64_t group = p_.kv.quantized_k.group;
    for (const Strided* x : {&p_.kv.quantized_k.scale, &p_.kv.quantized_k.offset})
      for (int64_t at = first / group; at <= last / group; ++at)
        for (int64_t b = 0; b < p_.head_dim * 2; b += 64)
          __builtin_prefetch(scale_row(*x, at) + b, 0, kToL1);
    for (const Strided* x : {&p_.kv.quantized_v.scale, &p_.kv.quantized_v.offset})
      for (int64_t b = 0; b < next_->count * x->row; b += 64)
        __builtin_prefetch(scale_row(*x, first) + b, 0, kToL1);
  }

  // accumulate_quantized in integers: blocks of up to 64 channels that share a scale and a nibble.
  template <int R, int Bits>
  void accumulate_in_integers(int row) {
    const int dim = (int)p_.value_dim, group = (int)p_.kv.quantized_v.group;
    const int half = Bits == 4 ? dim / 2 : dim;
    for (int g = 0; g < num_groups_; ++g)
      for (int r = 0; r < R; ++r)
        weights_to_integers(scaled_weights_[g][r], padded_count(), int_p_[g][r]);
    if (Bits == 4 && dim == 64 && num_groups_ == 1) return accumulate_both_nibbles<R>(row);
    for (int d = 0; d < dim;) {
      const bool high = d >= half;
      const int half_end = high ? dim : half, group_end = (d / group + 1) * group;
      int stop = d + 64 < half_end ? d + 64 : half_end;
      stop = stop < group_end ? stop : group_end;
      float* o[R];
      for (int r = 0; r < R; ++r) o[r] = o_[row + r] + d;
      // Of 4-bit values low nibbles fetch the keys of even rows, high ones those of odd rows.
      const int at = high ? d - half : d, last = high ? stop - half : stop;
      const PrefetchRows prefetch{row == 0 ? next_->k : nullptr, next_->count,
                                  at * k_bytes_ / half / 64 * 64, last * k_bytes_ / half,
                                  Bits == 8 || !high, Bits == 8 || high};
      auto weigh = [&]<Nibble nibble, bool Whole>() {
        weigh_channels<R, nibble, Whole>(tile_->v, tile_->count, high ? d - half : d, stop - d,
                                         int_p_[d / group], alpha_ + row, o, prefetch);
      };
      const bool whole = stop - d == 64;
      if constexpr (Bits == 8) {
        whole ? weigh.template operator()<Nibble::none, true>()
              : weigh.template operator()<Nibble::none, false>();
      } else if (high) {
        whole ? weigh.template operator()<Nibble::high, true>()
              : weigh.template operator()<Nibble::high, false>();
      } else {
        whole ? weigh.template operator()<Nibble::low, true>()
              : weigh.template operator()<Nibble::low, false>();
      }
      d = stop;
    }
  }
#endif

  static constexpr int kMaxGroups = 16;

  int num_groups_ = 0;
  bool integer_dot_ = false;  // products are computed in integers
  alignas(64) float scaled_q_[4][kDimPad];
  alignas(64) float v_scale_[kMaxGroups][kTile], v_offset_[kMaxGroups][kTile];
  alignas(64) float scaled_weights_[kMaxGroups][4][kTile];
#if defined(SACCADE_DOT)
  IntegerQuery int_q_[4];
  IntegerWeights int_p_[kMaxGroups][4];
#endif
  alignas(64) float lanes_[W];
  float bias_[4];
};

}  // namespace saccade::SACCADE_TARGET
