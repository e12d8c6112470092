// Decoding over plain keys and values (float32, bfloat16, float16), widened in registers.
#pragma once
#include "decode_state.h"

namespace saccade::SACCADE_TARGET {

class DecodePlain : protected DecodeState {
 protected:
  using DecodeState::DecodeState;

  template <int R>
  void score_plain(int row) {
    const int dim = (int)p_.head_dim;
    const float* q = q_[row];
#if defined(SACCADE_DOT)
    if (bf16_dot_) return dot_bf16<R>(row);
#endif
    switch (p_.kv.k.dtype) {
      case Dtype::f32: return dot<Plain<float>, R>(q, kDimPad, dim, row, 0, padded_count());
      case Dtype::bf16:
        if (!k_in_pairs()) return dot<Plain<Bf16>, R>(q, kDimPad, dim, row, 0, padded_count());
        return dot<Pairs, R>(q, kDimPad, dim, row, 0, padded_count());
      default: return dot<Plain<F16>, R>(q, kDimPad, dim, row, 0, padded_count());
    }
  }

  // Scores of R rows against keys [begin, end): W accumulators hold R rows x W/R keys.
  // `q` holds kParts registers for each chunk of stored elements.
  template <class Source, int R>
  SACCADE_NOINLINE void dot(const float* q, int q_stride, int length, int row, int begin, int end) {
    constexpr int keys = W / R, parts = Source::kParts, span = Source::kSpan;
    using T = typename Source::Element;
    for (int j = begin; j < end; j += keys) {
      F acc[W];
      const T* k[keys];
      SACCADE_UNROLL for (int i = 0; i < W; ++i) acc[i] = zero();
      SACCADE_UNROLL for (int i = 0; i < keys; ++i) k[i] = (const T*)tile_->k[j + i];
      if (row == 0) prefetch<keys>(tile_->v, j, tile_->count, 0, v_bytes_);
      auto multiply_add = [&](int i, const F* x, const float* of_chunk)
                              __attribute__((always_inline)) {
        SACCADE_UNROLL for (int r = 0; r < R; ++r)
          SACCADE_UNROLL for (int part = 0; part < parts; ++part) acc[r * keys + i] =
              fma(x[part], load(of_chunk + r * q_stride + part * W), acc[r * keys + i]);
      };
      int d = 0;
      const float* chunk = q;
      for (; d + span <= length; d += span, chunk += parts * W) {
        SACCADE_UNROLL for (int i = 0; i < keys; ++i) {
          F x[parts];
          Source::get(k[i] + d, x);
          multiply_add(i, x, chunk);
        }
      }
      if (d < length) {
        SACCADE_UNROLL for (int i = 0; i < keys; ++i) {
          F x[parts];
          get_part<Source>(k[i] + d, length - d, x);
          multiply_add(i, x, chunk);
        }
      }
      store_scores<R>(row, j, sum_each(acc));
    }
  }

  template <int R>
  SACCADE_INLINE_MEMBER void store_scores(int row, int j, F sums) {
    alignas(64) float lanes[W];
    store(lanes, sums);
    SACCADE_UNROLL for (int r = 0; r < R; ++r)
      std::memcpy(scores_[row + r] + j, lanes + r * (W / R), W / R * sizeof(float));
  }

#if defined(SACCADE_DOT)
  // The same for bfloat16 queries: exact products of pairs, two a lane and instruction.
  template <int R>
  SACCADE_NOINLINE void dot_bf16(int row) {
    constexpr int keys = W / R;
    const int chunks = (int)p_.head_dim / (2 * W);
    for (int j = 0; j < tile_->count; j += keys) {
      F acc[W];
      SACCADE_UNROLL for (int i = 0; i < W; ++i) acc[i] = zero();
      if (row == 0) prefetch<keys>(tile_->v, j, tile_->count, 0, v_bytes_);
      for (int c = 0; c < chunks; ++c) {
        SACCADE_UNROLL for (int i = 0; i < keys; ++i) {
          const __m512i k = _mm512_loadu_si512(tile_->k[j + i] + c * 64);
          SACCADE_UNROLL for (int r = 0; r < R; ++r) acc[r * keys + i] = dot_pairs(
              k, _mm512_load_si512(q_pairs_[row + r] + c * 2 * W), acc[r * keys + i]);
        }
      }
      store_scores<R>(row, j, mul(sum_each(acc), set1(factor_)));
    }
  }
#endif

  template <int R>
  void accumulate_plain(int row) {
    switch (p_.kv.v.dtype) {
      case Dtype::f32: return accumulate_rows<Plain<float>, R>(row);
      case Dtype::bf16:
        if (!o_in_pairs()) return accumulate_rows<Plain<Bf16>, R>(row);
        return accumulate_rows<Pairs, R>(row);
      default: return accumulate_rows<Plain<F16>, R>(row);
    }
  }

  template <class Source, int R>
  void accumulate_rows(int row) {
    constexpr int span = Source::kSpan, vectors = most_vectors<Source, R>();
    const int dim = (int)p_.value_dim;
    const float* weights[R][Source::kParts];
    for (int r = 0; r < R; ++r)
      for (int part = 0; part < Source::kParts; ++part) weights[r][part] = scores_[row + r];
    int d = 0;
    for (; d + vectors * span <= dim; d += vectors * span)
      add_values<Source, R, vectors>(row, d, weights);
    for (; d + span <= dim; d += span) add_values<Source, R, 1>(row, d, weights);
    if (d < dim) add_last_values<Source, R>(row, d, dim - d);
  }

  template <class Source, int R>
  static constexpr int most_vectors() {
    constexpr int n = kAccumulators / R / Source::kParts;
    return n > 0 ? n : 1;
  }

  // o = o * alpha + weights @ values for NV chunks of channels from stored element `at`.
  template <class Source, int R, int NV>
  SACCADE_NOINLINE void add_values(int row, int at,
                                   const float* const (&weights)[R][Source::kParts]) {
    constexpr int parts = Source::kParts, span = Source::kSpan;
    using T = typename Source::Element;
    F acc[R][NV][parts];
    SACCADE_UNROLL for (int r = 0; r < R; ++r)
      SACCADE_UNROLL for (int n = 0; n < NV; ++n)
        SACCADE_UNROLL for (int part = 0; part < parts; ++part) acc[r][n][part] = zero();
    const int64_t prefetch_begin = at * k_bytes_ / stored_;
    const int64_t prefetch_end = (at + NV * span) * k_bytes_ / stored_;
    for (int j = 0; j < tile_->count; ++j) {
      const T* v = (const T*)tile_->v[j] + at;
      if (row == 0) prefetch<1>(next_->k, j, next_->count, prefetch_begin, prefetch_end);
      F x[NV][parts];
      SACCADE_UNROLL for (int n = 0; n < NV; ++n) Source::get(v + n * span, x[n]);
      SACCADE_UNROLL for (int r = 0; r < R; ++r)
        SACCADE_UNROLL for (int part = 0; part < parts; ++part) {
          const F weight = set1(weights[r][part][j]);
          SACCADE_UNROLL for (int n = 0; n < NV; ++n)
            acc[r][n][part] = fma(weight, x[n][part], acc[r][n][part]);
        }
    }
    const int length = (int)p_.value_dim / parts;
    SACCADE_UNROLL for (int r = 0; r < R; ++r) {
      const F alpha = set1(alpha_[row + r]);
      SACCADE_UNROLL for (int n = 0; n < NV; ++n)
        SACCADE_UNROLL for (int part = 0; part < parts; ++part) {
          float* o = o_[row + r] + Source::place(at + n * span, part, length);
          store(o, fma(load(o), alpha, acc[r][n][part]));
        }
    }
  }

  // The channels after the last full chunk.
  template <class Source, int R>
  void add_last_values(int row, int at, int n) {
    constexpr int parts = Source::kParts;
    using T = typename Source::Element;
    for (int r = 0; r < R; ++r) {
      F acc[parts];
      for (int part = 0; part < parts; ++part) acc[part] = zero();
      for (int j = 0; j < tile_->count; ++j) {
        F x[parts];
        get_part<Source>((const T*)tile_->v[j] + at, n, x);
        for (int part = 0; part < parts; ++part)
          acc[part] = fma(set1(scores_[row + r][j]), x[part], acc[part]);
      }
      for (int part = 0; part < parts; ++part) {
        float* o = o_[row + r] + at + part * W;
        store(o, fma(load(o), set1(alpha_[row + r]), acc[part]));
      }
    }
  }
};

}  // namespace saccade::SACCADE_TARGET
