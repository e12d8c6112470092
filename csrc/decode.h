// A few queries against many keys: the work is reading the keys once, so nothing is packed.
//
// All rows of a group (query heads x queries, at most 8) share each key that is loaded.  Keys and
// values are widened in registers.  Codes are never dequantised: the scales of a key group are
// folded into the queries and those of a value into its weight,
//
//     q . (code * scale + offset)     = (q * scale) . code + q . offset
//     sum p (code * scale + offset)   = sum (p * scale) code + sum p * offset
#pragma once
#include "finish.h"
#include "integer_dot.h"
#include "micro_kernel.h"
#include "pack.h"
#include "plan.h"
#include "softmax.h"
#include "sources.h"

namespace saccade::SACCADE_TARGET {

constexpr int kMaxRows = 8;
#if defined(SACCADE_AVX2) && !defined(SACCADE_AVX512)
constexpr int kAccumulators = 8;  // of 16 registers
#else
constexpr int kAccumulators = 16;
#endif

class Decode {
 public:
  Decode(const Problem& p, const Partials& partials) : p_(p), partials_(partials) {}

  void run(const Piece& piece) {
    const Sequence& s = p_.sequences[piece.sequence];
    piece_ = &piece;
    sequence_ = &s;
    num_rows_ = (int)(piece.row_end - piece.row_begin);
    start();
    Range* ranges = (Range*)scratch(Scratch::kernel, max_ranges(p_, s) * sizeof(Range));
    const int64_t num_ranges = visited_ranges(p_, s, piece, ranges);
    const Range part = split_part(total_keys(ranges, num_ranges), piece.split, piece.splits);
    KeyWalk walk(p_, s, piece.head, ranges, num_ranges, part.start, part.stop - part.start);
    // The next tile is known while one is computed, so that its memory can be asked for in time.
    bool more = walk.next(tiles_[0]);
    for (int turn = 0; more; turn ^= 1) {
      more = walk.next(tiles_[turn ^ 1]);
      if (!more) tiles_[turn ^ 1].count = 0;
      tile_ = &tiles_[turn];
      next_ = &tiles_[turn ^ 1];
      absorb_tile();
    }
    write();
  }

 private:
  // Rows in groups of 4, 2 or 1.
  template <class Visit>
  void each_group(Visit&& visit) {
    for (int row = 0; row < num_rows_; row += 4) {
      const int rest = num_rows_ - row;
      if (rest >= 3) visit.template operator()<4>(row);
      if (rest == 2) visit.template operator()<2>(row);
      if (rest == 1) visit.template operator()<1>(row);
    }
  }

  void start() {
    const Sequence& s = *sequence_;
    const float factor = p_.softcap != 0.f ? p_.scale / p_.softcap : p_.scale * kLog2e;
    factor_ = factor;
#if defined(SACCADE_DOT)
    const View& kv = p_.kv;
    const bool whole = p_.head_dim * kv.k_codes.bits % 32 == 0;
    integers_ = kv.kind == ViewKind::quantized && p_.q.dtype != Dtype::f32 && whole;
    dots_pairs_ = k_in_pairs() && p_.q.dtype == Dtype::bf16 && p_.head_dim % (2 * W) == 0;
#endif
    const size_t q_bytes = sizeof(float) * (size_t)padded_dim((int)p_.head_dim);
    const size_t o_bytes = sizeof(float) * (size_t)padded_dim((int)p_.value_dim);
    for (int i = 0; i < kMaxRows; ++i) {
      const int64_t row = least(piece_->row_begin + i, piece_->row_end - 1);
      const int64_t query = row / p_.group, head = piece_->head * p_.group + row % p_.group;
      const int64_t at = s.q_offset + query;
      rows_[i] = {(int32_t)at, p_.causal ? (int32_t)at : kEverywhere,
                  p_.window != kUnlimited ? (int32_t)most(at - p_.window, INT32_MIN) : INT32_MIN,
                  p_.alibi ? p_.alibi[s.batch * p_.alibi_batch + head] * kLog2e : 0.f, query, head};
      const bool sink = p_.sink_logits && piece_->split == 0;
      m_[i] = sink ? p_.sink_logits[head] * kLog2e : -kInf;
      std::memset(l_[i], 0, sizeof l_[i]);
      if (m_[i] != -kInf) l_[i][0] = 1.f;
      if (i < (num_rows_ + 3) / 4 * 4) {  // whole groups of rows are computed
        std::memset(q_[i], 0, q_bytes);
        std::memset(o_[i], 0, o_bytes);
        std::memset(q_pairs_[i], 0, q_bytes / 2);
      }
      if (i < num_rows_) load_query(rows_[i], factor, q_[i]);
    }
  }

  void load_query(const Row& row, float factor, float* x) {
    const int dim = (int)p_.head_dim;
    const char* q = p_.q.data + sequence_->batch * p_.q.batch + row.head * p_.q.head +
                    (sequence_->q_begin + row.query) * p_.q.row;
    switch (p_.q.dtype) {
      case Dtype::f32: widen((const float*)q, dim, factor, x); break;
      case Dtype::bf16: widen((const Bf16*)q, dim, factor, x); break;
      default: widen((const F16*)q, dim, factor, x);
    }
    if (k_in_pairs()) split_pairs(x, dim);
    if (dots_pairs_) std::memcpy(q_pairs_[&row - rows_], q, dim * sizeof(Bf16));
  }

  bool k_in_pairs() const { return p_.kv.k.dtype == Dtype::bf16 && p_.kv.kind != ViewKind::quantized; }

  void absorb_tile() {
    const bool nibbles = tile_->packed && p_.kv.v_codes.bits == 4;
    stored_ = p_.value_dim / (nibbles ? 2 : 1);
    k_bytes_ = row_bytes(next_->packed, p_.kv.k, p_.kv.k_codes, p_.head_dim);
    v_bytes_ = row_bytes(tile_->packed, p_.kv.v, p_.kv.v_codes, p_.value_dim);
    const bool all_seen = rows_see_all();
    tile_full_ = all_seen && !tile_->holes && tile_->count % kTilePad == 0;
    values_finite_ = all_seen || check_values();
    each_group([&]<int R>(int row) { score<R>(row); });
    each_group([&]<int R>(int row) { soften<R>(row); });
    prepare_values();
    each_group([&]<int R>(int row) { accumulate<R>(row); });
  }

  static int64_t row_bytes(bool packed, const Strided& rows, const Codes& codes, int64_t dim) {
    if (packed) return dim * codes.bits / 8;
    return dim * (rows.dtype == Dtype::f32 ? 4 : 2);
  }

  // Whether every row sees every key of the tile that is somewhere.
  bool rows_see_all() const {
    const Row &low = rows_[0], &high = rows_[num_rows_ - 1];
    const int32_t sinks = (int32_t)p_.sinks;
    return tile_->high <= low.last && (tile_->low > high.after || tile_->high < sinks) && !by_row();
  }

  bool by_row() const {
    return p_.attn_mask.data || (p_.blocks.data && p_.q_block < sequence_->q_len);
  }

  // The key positions of the tile as one row sees them.
  const int32_t* positions_of(int row) {
    if (!by_row()) return tile_->positions;
    const Row& r = rows_[row];
    const ByteGrid& g = p_.attn_mask;
    for (int j = 0; j < kTile; ++j) {
      const int32_t at = j < tile_->count ? tile_->positions[j] : kNowhere;
      bool seen = at != kNowhere;
      if (seen && g.data)
        seen = g.data[sequence_->batch * g.batch + r.head * g.head + r.query * g.row + at * g.column];
      if (seen && p_.blocks.data)
        seen = block_allowed(p_, sequence_->batch, piece_->head, r.query / p_.q_block,
                             at / p_.k_block);
      row_positions_[j] = seen ? at : kNowhere;
    }
    return row_positions_;
  }

  // ---- scores ----

  template <int R>
  void score(int row) {
    if (tile_->packed) {
      if (p_.kv.k_codes.bits == 8) return score_codes<Plain<uint8_t>, R>(row);
      return score_codes<Nibbles, R>(row);
    }
    const int dim = (int)p_.head_dim;
    const float* q = q_[row];
#if defined(SACCADE_DOT)
    if (dots_pairs_) return dot_bf16<R>(row);
#endif
    switch (p_.kv.k.dtype) {
      case Dtype::f32: return dot<Plain<float>, R>(q, kDimPad, dim, row, 0, padded_count());
      case Dtype::bf16:
        if (!k_in_pairs()) return dot<Plain<Bf16>, R>(q, kDimPad, dim, row, 0, padded_count());
        return dot<Pairs, R>(q, kDimPad, dim, row, 0, padded_count());
      default: return dot<Plain<F16>, R>(q, kDimPad, dim, row, 0, padded_count());
    }
  }

  int padded_count() const { return (int)ceil_div(tile_->count, kTilePad) * kTilePad; }

  // Into L2: asking for L1 would block the few buffers that its own misses need (measured: half the
  // speed).
  static constexpr int kToL2 = 2;

  // Asks for bytes [begin, end) of N rows that will be read soon, while there is arithmetic to do:
  // spread evenly, because the requests in flight are few.
  template <int N>
  SACCADE_INLINE void prefetch(const char* const* rows, int first, int count, int64_t begin,
                               int64_t end) {
    if (first + N > count) return;
    for (int i = 0; i < N; ++i)
      for (int64_t b = begin; b < end; b += 64) __builtin_prefetch(rows[first + i] + b, 0, kToL2);
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

  // The first key from `begin` on that is not before token `stop`; tokens of a tile ascend.
  int end_of_group(int begin, int64_t stop) const {
    const int64_t* index = tile_->index;
    const int last = tile_->count - 1;
    if (index[last] - index[begin] == last - begin)
      return (int)least(last + 1, begin + stop - index[begin]);
    int end = begin + 1;
    while (end <= last && index[end] < stop) ++end;
    return end;
  }

  template <class Source, int R>
  void score_codes(int row) {
    const Codes& c = p_.kv.k_codes;
    for (int begin = 0; begin < tile_->count;) {
      const int64_t group = tile_->index[begin] / c.group;
      const int end = end_of_group(begin, (group + 1) * c.group);
#if defined(SACCADE_DOT)
      if (integers_) {
        score_integers<R>(row, group, begin, end);
        begin = end;
        continue;
      }
#endif
      fold_queries<Source, R>(row, group);
      // Whole blocks of keys are computed; what lies behind `end` is overwritten by the next group.
      const int length = (int)p_.head_dim / Source::kParts;
      dot<Source, R>(folded_[0], kDimPad, length, row, begin, end);
      for (int r = 0; r < R; ++r)
        for (int j = begin; j < end; ++j) scores_[row + r][j] += bias_[r];
      begin = end;
    }
  }

#if defined(SACCADE_DOT)
  // The same in integers, sixteen keys at a time.
  template <int R>
  void score_integers(int row, int64_t group, int begin, int end) {
    const Codes& c = p_.kv.k_codes;
    const int dim = (int)p_.head_dim;
    alignas(64) float scale[kDimPad], offset[kDimPad];
    half_row(scale_row(c.scale, group), dim, scale);
    half_row(scale_row(c.offset, group), dim, offset);
    if (row == 0) prefetch_scales(group + 1, begin == 0);
    const float* q[R];
    float* out[R];
    for (int r = 0; r < R; ++r) {
      q[r] = q_[row + r];
      out[r] = scores_[row + r];
    }
    fold_to_integers<R>(q, scale, offset, dim, c.bits == 8 ? 128.f : 8.f, int_q_, bias_);
    for (int j = begin; j < end; j += W) {
      if (row == 0) prefetch<W>(tile_->v, j, tile_->count, 0, v_bytes_);
      float* at[R];
      for (int r = 0; r < R; ++r) at[r] = out[r] + j;
      if (c.bits == 8) score_codes16<R, 8>(tile_->k + j, dim, int_q_, bias_, at);
      else score_codes16<R, 4>(tile_->k + j, dim, int_q_, bias_, at);
    }
  }

  // Scales are read once a tile, too far apart for the hardware to see them coming.
  void prefetch_scales(int64_t key_group, bool values) const {
    for (const Strided* x : {&p_.kv.k_codes.scale, &p_.kv.k_codes.offset})
      for (int64_t b = 0; b < p_.head_dim * 2; b += 64)
        __builtin_prefetch(scale_row(*x, key_group) + b, 0, kToL2);
    if (!values) return;
    for (const Strided* x : {&p_.kv.v_codes.scale, &p_.kv.v_codes.offset})
      for (int64_t b = 0; b < tile_->count * x->row; b += 64)
        __builtin_prefetch(scale_row(*x, tile_->index[0]) + b, 0, kToL2);
  }

  // Values in integers: blocks of up to 64 channels that share a scale and a nibble.
  template <int R, int Bits>
  void weigh_integers(int row) {
    const int dim = (int)p_.value_dim, group = (int)p_.kv.v_codes.group;
    const int half = Bits == 4 ? dim / 2 : dim;
    for (int g = 0; g < num_groups_; ++g)
      for (int r = 0; r < R; ++r) to_integers(scaled_[g][r], padded_count(), int_p_[g][r]);
    for (int d = 0; d < dim;) {
      const bool high = d >= half;
      const int half_end = high ? dim : half, group_end = (d / group + 1) * group;
      int stop = d + 64 < half_end ? d + 64 : half_end;
      stop = stop < group_end ? stop : group_end;
      float* o[R];
      for (int r = 0; r < R; ++r) o[r] = o_[row + r] + d;
      const Fetch fetch{row == 0 ? next_->k : nullptr, next_->count,
                        d * k_bytes_ / dim / 64 * 64, stop * k_bytes_ / dim};
      auto weigh = [&]<Part part, bool Whole>() {
        weigh_codes<R, part, Whole>(tile_->v, tile_->count, high ? d - half : d, stop - d,
                                    int_p_[d / group], alpha_ + row, o, fetch);
      };
      const bool whole = stop - d == 64;
      if constexpr (Bits == 8) {
        whole ? weigh.template operator()<Part::bytes, true>()
              : weigh.template operator()<Part::bytes, false>();
      } else if (high) {
        whole ? weigh.template operator()<Part::high_nibbles, true>()
              : weigh.template operator()<Part::high_nibbles, false>();
      } else {
        whole ? weigh.template operator()<Part::low_nibbles, true>()
              : weigh.template operator()<Part::low_nibbles, false>();
      }
      d = stop;
    }
  }
#endif

  // folded = q * scale in the order of the chunks, bias = q . offset.
  template <class Source, int R>
  void fold_queries(int row, int64_t group) {
    constexpr int parts = Source::kParts;
    const Codes& c = p_.kv.k_codes;
    const int dim = (int)p_.head_dim, length = dim / parts;
    alignas(64) float scale[kDimPad], offset[kDimPad];
    half_row(scale_row(c.scale, group), dim, scale);
    half_row(scale_row(c.offset, group), dim, offset);
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
          store(folded_[r] + (chunk * parts + part) * W, x);
        }
    }
  }

  const float* lanes_of(F x) {
    store(lanes_, x);
    return lanes_;
  }

  const char* scale_row(const Strided& s, int64_t row) const {
    return s.data + sequence_->batch * s.batch + piece_->head * s.head + row * s.row;
  }

  // ---- softmax ----

  template <int R>
  void soften(int row) {
    const Scoring how{!tile_full_, p_.alibi != nullptr, p_.softcap * kLog2e, (int32_t)p_.sinks};
    online_softmax<R>(Softmax{m_, alpha_, l_[0]}, row, rows_, how,
                      [&](int i) { return positions_of(row + i); }, scores_[row], kScoreStride, 0,
                      padded_count());
  }

  // ---- values ----

  // Are all values finite?  Asked only for tiles of which some row does not see all.
  bool check_values() {
    F taint = zero();
    for (int j = 0; j < tile_->count; ++j) {
      widen_value(j);
      for (int d = 0; d < (int)p_.value_dim; d += W) taint = fma(load(value_ + d), zero(), taint);
    }
    return hsum(taint) == 0.f;
  }

  void widen_value(int j) {
    const int dim = (int)p_.value_dim;
    if (tile_->packed) {
      const Codes& c = p_.kv.v_codes;
      if (tile_->positions[j] == kNowhere) {
        std::memset(value_, 0, sizeof value_);
      } else {
        dequantize_value(c, offset_of(c.scale), offset_of(c.offset), *tile_, j, dim, value_);
      }
      return;
    }
    switch (p_.kv.v.dtype) {
      case Dtype::f32: return widen((const float*)tile_->v[j], dim, 1.f, value_);
      case Dtype::bf16: return widen((const Bf16*)tile_->v[j], dim, 1.f, value_);
      default: return widen((const F16*)tile_->v[j], dim, 1.f, value_);
    }
  }

  int64_t offset_of(const Strided& s) const {
    return sequence_->batch * s.batch + piece_->head * s.head;
  }

  // Scales of the values of the tile, transposed to [group][key].
  void prepare_values() {
    if (!tile_->packed) return;
    const Codes& c = p_.kv.v_codes;
    num_groups_ = (int)(p_.value_dim / c.group);
    folds_values_ = num_groups_ <= kMaxGroups && c.group % W == 0 && values_finite_ &&
                    (c.bits == 8 || (p_.value_dim / 2) % W == 0);
    if (!folds_values_) return;
    read_value_scales(c.scale, v_scale_);
    read_value_scales(c.offset, v_offset_);
  }

  // Numbers [key][group] in float16 as float32 [group][key].
  void read_value_scales(const Strided& s, float (*out)[kTile]) {
    alignas(64) float x[kTile * kMaxGroups + W];
    const int n = num_groups_, count = tile_->count;
    const bool run = tile_->index[count - 1] - tile_->index[0] == count - 1;
    if (run && s.row == n * (int64_t)sizeof(F16)) {
      half_row(scale_row(s, tile_->index[0]), n * count, x);
    } else {
      for (int j = 0; j < count; ++j) half_row(scale_row(s, tile_->index[j]), n, x + j * n);
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
          if (tile_->positions[j] == kNowhere) out[g][j] = 0.f;
      for (int j = count; j < padded_count(); ++j) out[g][j] = 0.f;
    }
  }

  template <int N>
  void transpose_scales(const float* x, float (*out)[kTile]) {
    for (int g = 0; g < N; ++g)
      for (int j = 0; j < kTile; ++j) out[g][j] = x[j * N + g];
  }

  template <int R>
  void accumulate(int row) {
    if (!values_finite_) return accumulate_visible<R>(row);
    if (tile_->packed) {
      if (!folds_values_) return accumulate_visible<R>(row);
      if (p_.kv.v_codes.bits == 8) return accumulate_codes<Plain<uint8_t>, R>(row);
      return accumulate_codes<Nibbles, R>(row);
    }
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
    const int64_t fetch_begin = at * k_bytes_ / stored_;
    const int64_t fetch_end = (at + NV * span) * k_bytes_ / stored_;
    for (int j = 0; j < tile_->count; ++j) {
      const T* v = (const T*)tile_->v[j] + at;
      if (row == 0) prefetch<1>(next_->k, j, next_->count, fetch_begin, fetch_end);
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
      const F shrink = set1(alpha_[row + r]);
      SACCADE_UNROLL for (int n = 0; n < NV; ++n)
        SACCADE_UNROLL for (int part = 0; part < parts; ++part) {
          float* o = o_[row + r] + Source::place(at + n * span, part, length);
          store(o, fma(load(o), shrink, acc[r][n][part]));
        }
    }
  }

  // The channels behind the last whole chunk.
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

  // Codes: weights times scales for each group of channels, and the offsets once for a group.
  template <class Source, int R>
  void accumulate_codes(int row) {
    constexpr int parts = Source::kParts;
    const int dim = (int)p_.value_dim, half = dim / parts, group = (int)p_.kv.v_codes.group;
    float gained[kMaxGroups][R];
    for (int g = 0; g < num_groups_; ++g) scale_weights<R>(row, g, gained[g]);
#if defined(SACCADE_DOT)
    if (integers_) weigh_integers<R, Source::kParts == 2 ? 4 : 8>(row);
    for (int d = integers_ ? half : 0; d < half;) {
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
          weights[r][part] = scaled_[(part * half + d) / group][r];
      constexpr int vectors = most_vectors<Source, R>();
      for (; d + vectors * W <= stop; d += vectors * W)
        add_values<Source, R, vectors>(row, d, weights);
      for (; d < stop; d += W) add_values<Source, R, 1>(row, d, weights);
    }
    for (int g = 0; g < num_groups_; ++g)
      for (int r = 0; r < R; ++r)
        for (int d = g * group; d < (g + 1) * group; d += W) {
          float* o = o_[row + r] + d;
          store(o, add(load(o), set1(gained[g][r])));
        }
  }

  template <int R>
  void scale_weights(int row, int g, float* gained) {
    const int end = padded_count();
    for (int r = 0; r < R; ++r) {
      F offset = zero();
      for (int j = 0; j < end; j += W) {
        const F p = load(scores_[row + r] + j);
        store(scaled_[g][r] + j, mul(p, load(v_scale_[g] + j)));
        offset = fma(p, load(v_offset_[g] + j), offset);
      }
      gained[r] = hsum(offset);
    }
  }

  // Key by key, for unseen values that may be NaN or infinite and for unusual group sizes.
  template <int R>
  void accumulate_visible(int row) {
    const int dim = (int)p_.value_dim;
    for (int r = 0; r < R; ++r) {
      const int32_t* positions = positions_of(row + r);
      float* o = o_[row + r];
      for (int d = 0; d < padded_dim(dim); ++d) o[d] *= alpha_[row + r];
      for (int j = 0; j < tile_->count; ++j) {
        if (!is_visible(rows_[row + r], (int32_t)p_.sinks, positions[j])) continue;
        widen_value(j);
        if (o_in_pairs()) split_pairs(value_, dim);
        const F weight = set1(scores_[row + r][j]);
        for (int d = 0; d < padded_dim(dim); d += W)
          store(o + d, fma(weight, load(value_ + d), load(o + d)));
      }
    }
  }

  // Rows that may be kept as even and odd channels take room for whole chunks.
  static int padded_dim(int dim) { return (int)ceil_div(dim, 2 * W) * 2 * W; }

  bool o_in_pairs() const { return p_.kv.v.dtype == Dtype::bf16 && p_.kv.kind != ViewKind::quantized; }

  void write() {
    for (int i = 0; i < num_rows_; ++i) {
      if (o_in_pairs()) join_pairs(o_[i], (int)p_.value_dim);
      const float l = hsum(load(l_[i]));
      if (piece_->splits == 1) {
        write_row(p_, *sequence_, rows_[i].query, rows_[i].head, o_[i], m_[i], l);
        continue;
      }
      const int64_t at = piece_->first_partial + i;
      partials_.m[at] = m_[i];
      partials_.l[at] = l;
      std::memcpy(partials_.o + at * p_.value_dim, o_[i], p_.value_dim * sizeof(float));
    }
  }

  static constexpr int kMaxGroups = 16;

  const Problem& p_;
  const Partials& partials_;
  const Piece* piece_ = nullptr;
  const Sequence* sequence_ = nullptr;
  int num_rows_ = 0, num_groups_ = 0;
  int64_t k_bytes_ = 0, v_bytes_ = 0;  // of the rows that are fetched ahead
  int64_t stored_ = 1;                 // elements of a stored value
  bool tile_full_ = false, values_finite_ = true, folds_values_ = false;
  bool dots_pairs_ = false;  // scores come from products of bfloat16 pairs
  bool integers_ = false;    // products with codes are computed in integers
  float factor_ = 1.f;
  Row rows_[kMaxRows];
  alignas(64) float q_[kMaxRows][kDimPad];
  alignas(64) Bf16 q_pairs_[kMaxRows][kDimPad];
  alignas(64) float folded_[4][kDimPad];
  alignas(64) float o_[kMaxRows][kDimPad];
  alignas(64) float scores_[kMaxRows][kScoreStride];
  alignas(64) float l_[kMaxRows][W];
  alignas(64) float value_[kDimPad];
  alignas(64) float v_scale_[kMaxGroups][kTile], v_offset_[kMaxGroups][kTile];
  alignas(64) float scaled_[kMaxGroups][4][kTile];
#if defined(SACCADE_DOT)
  IntegerQuery int_q_[4];
  IntegerWeights int_p_[kMaxGroups][4];
#endif
  alignas(64) float lanes_[W];
  float m_[kMaxRows + W], alpha_[kMaxRows + W], bias_[4];
  int32_t row_positions_[kTile];
  Tile tiles_[2];
  const Tile* tile_ = nullptr;  // the one being computed
  const Tile* next_ = nullptr;  // the one being fetched
};

}  // namespace saccade::SACCADE_TARGET
