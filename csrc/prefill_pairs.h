// Many queries in bfloat16: the products of prefill.h by dot products of pairs (pair_products.h)
// or by matrix tiles (amx_products.h), with float32 sums.
//
// Queries are rounded to nothing less than they are: their factor joins the scores, in float32.
// Weights are at most 1 and rounded to bfloat16 for the product with the values; their sum, and
// with it the lse, is that of the weights before.  With two parts a number is the sum of two
// bfloat16, for float16 storage where three products cost less than one in float32.
#pragma once
#include "amx_products.h"
#include "pair_products.h"
#include "prefill_rows.h"

#if defined(SACCADE_DOT)
namespace saccade::SACCADE_TARGET {

#if defined(SACCADE_AMX)
using Products = AmxProducts;
constexpr int kMostParts = 2;
#else
using Products = DotProducts;
constexpr int kMostParts = 1;
#endif

// Parts that hold every number of a call; 0 where it has to be computed in float32.
SACCADE_INLINE int parts_of(const Problem& p) {
  const Dtype dtype = p.q.dtype;
  if (p.kv.k.dtype != dtype || p.kv.v.dtype != dtype) return 0;
  if (dtype == Dtype::bf16) return 1;
#if defined(SACCADE_AMX)
  if (dtype == Dtype::f16) return 2;
#endif
  return 0;
}

template <int Parts>
class PrefillPairs : public PrefillRows<PrefillPairs<Parts>> {
  using Base = PrefillRows<PrefillPairs<Parts>>;
  friend Base;
  using Base::o_, Base::o_stride_, Base::p_, Base::scores_, Base::state_, Base::values_finite_;

 public:
  using Base::Base;

  void run(const WorkItem& item, void* memory) {
    [[maybe_unused]] const Products::Session session;
    Base::run(item, memory);
  }

 private:
  static constexpr int64_t kWeightPart = Products::kStrip * kWeightStride;

  void lay_out(Arena& arena) {
    this->lay_out_rows(arena, Products::kStrip);
    depth_ = (int)ceil_div(p_.head_dim, Products::kDepth) * Products::kDepth;
    q_part_ = this->padded_rows_ * (int64_t)depth_;
    k_part_ = kTile * (int64_t)depth_;
    v_part_ = kTile * o_stride_;
    q_ = arena.take<Bf16>(Parts * q_part_);
    k_panels_ = arena.take<Bf16>(Parts * k_part_);
    v_panels_ = arena.take<Bf16>(Parts * v_part_);
    weights_ = arena.take<Bf16>(Parts * kWeightPart);
  }

  template <class Visit>
  void each_strip(Visit&& visit) {
    Products::each_strip(this->num_rows_, visit);
  }

  void pack_queries() {
    each_strip([&]<int MR>(int first) {
      for (int i = 0; i < MR; ++i) {
        const char* row = row_data(p_.q, *this->sequence_, this->rows_[first + i]);
        if (p_.q.dtype == Dtype::bf16) {
          pack_query<MR>((const Bf16*)row, first, i);
        } else {
          pack_query<MR>((const F16*)row, first, i);
        }
      }
    });
  }

  template <int MR, class T>
  void pack_query(const T* row, int first, int i) {
    alignas(64) Bf16 x[Parts][kDimPad];
    const int dim = (int)p_.head_dim;
    for (int d = 0; d < dim; d += kPair) {
      __m512i parts[Parts];
      get_pairs<Parts>(row + d, dim - d, parts);
      for (int part = 0; part < Parts; ++part) _mm512_store_si512(x[part] + d, parts[part]);
    }
    for (int part = 0; part < Parts; ++part)
      Products::place_query<MR>(x[part], depth_, i, q_ + part * q_part_ + (int64_t)first * depth_);
  }

  void pack_tile() {
    PairPacker<Parts> packer(p_, this->sequence_->batch, this->item_->head, depth_);
    keys_finite_ = packer.keys(this->tile_, k_panels_);
    values_finite_ = packer.values(this->tile_, v_panels_);
  }

  template <int MR>
  SACCADE_NOINLINE void process_strip(int first) {
    const auto part = this->part_of(first, first + MR - 1);
    if (part.visible.begin == part.visible.end) return;
    score<MR>(first, part.begin, part.end);
    weigh<MR>(first, part);
    this->template keep_weights<MR>(first, part.begin, part.end);
    // Of two parts an infinite value has products inf * 0.
    if (values_finite_ || (part.full && Parts == 1)) return accumulate<MR>(first, part.visible);
    this->template accumulate_visible<MR>(
        first, part.visible,
        [&](int i, int j) { return sum_of(weights_ + i * kWeightStride + j, kWeightPart); },
        [&](int j, int64_t d) {
          const int64_t panel = d / kPair * kPair * kTile;
          return sum_of(v_panels_ + panel + (j / 2 * kPair + d % kPair) * 2 + j % 2, v_part_);
        });
  }

  template <int MR>
  void score(int first, int begin, int end) {
    const Bf16* q = q_ + (int64_t)first * depth_;
    for (int c = begin; c < end; c += kPair) {
      const Bf16* k = k_panels_ + (int64_t)c * depth_;
      if constexpr (Parts == 2)
        if (!keys_finite_) {
          score_one_by_one<MR>(q, k, scores_ + c);
          continue;
        }
      Products::score<MR, Parts>(q, q_part_, k, k_part_, depth_, scores_ + c);
    }
  }

  // Where a key of two parts is infinite, whose products with both parts of q may be inf - inf.
  template <int MR>
  void score_one_by_one(const Bf16* q, const Bf16* k, float* s) {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < kPair; ++j) {
        float sum = 0.f;
        for (int d = 0; d < (int)p_.head_dim; ++d)
          sum += sum_of(q + i * depth_ + d, q_part_) *
                 sum_of(k + (d / 2 * kPair + j) * 2 + d % 2, k_part_);
        s[i * kScoreStride + j] = sum;
      }
  }

  // A number from its parts.
  static float sum_of(const Bf16* x, int64_t part) {
    float sum = 0.f;
    for (int i = 0; i < Parts; ++i) {
      const uint32_t bits = (uint32_t)x[i * part].bits << 16;
      float y;
      std::memcpy(&y, &bits, sizeof y);
      sum += y;
    }
    return sum;
  }

  // Scores become weights in bfloat16.
  template <int MR, class Part>
  void weigh(int first, const Part& part) {
    const Scoring how = this->scoring(part, query_factor(p_));
    alignas(64) float top[kMaximaRoom<MR>] = {};
    find_maxima<MR>(state_, first, this->rows_, how,
                    [&](int i) { return this->positions_of(first + i, i); }, scores_, kScoreStride,
                    part.begin, part.end, top);
    const F factor = set1(how.plain() ? how.factor : 1.f);
    for (int i = 0; i < MR; ++i) weigh_row(first, i, part.begin, part.end, factor, set1(-top[i]));
  }

  SACCADE_INLINE_MEMBER void weigh_row(int first, int i, int begin, int end, F factor, F anchor) {
    float* l = state_.l + (first + i) * W;
    float* s = scores_ + i * kScoreStride;
    F sum = mul(load(l), set1(state_.alpha[first + i]));
    for (int c = begin; c < end; c += kPair) {
      const F a = exp2_rough(fma(load(s + c), factor, anchor));
      const F b = exp2_rough(fma(load(s + c + W), factor, anchor));
      sum = add(sum, add(a, b));
      if (p_.receives) {
        store(s + c, a);
        store(s + c + W, b);
      }
      __m512i parts[Parts];
      split_into_parts<Parts>(a, b, parts);
      for (int part = 0; part < Parts; ++part)
        _mm512_storeu_si512(weights_ + part * kWeightPart + i * kWeightStride + c, parts[part]);
    }
    store(l, sum);
  }

  // o = o * alpha + P V
  template <int MR>
  void accumulate(int first, Columns visible) {
    constexpr int step = Products::kDepth;
    const int begin = visible.begin / step * step;
    const int keys = (int)ceil_div(visible.end, step) * step - begin;
    const float* alpha = state_.alpha + first;
    float* o = o_ + first * o_stride_;
    for (int64_t d = 0; d < p_.value_dim; d += kPair) {
      const Bf16* v = v_panels_ + d * kTile + begin * kPair;
      if (p_.value_dim - d > W) {
        Products::accumulate<MR, kVectors, Parts>(weights_ + begin, kWeightPart, v, v_part_, keys,
                                                  alpha, o + d, o_stride_);
      } else {
        Products::accumulate<MR, 1, Parts>(weights_ + begin, kWeightPart, v, v_part_, keys, alpha,
                                           o + d, o_stride_);
      }
    }
  }

  int depth_ = 0;  // channels of packed queries and keys
  int64_t q_part_ = 0, k_part_ = 0, v_part_ = 0;
  bool keys_finite_ = true;
  Bf16 *q_ = nullptr, *k_panels_ = nullptr, *v_panels_ = nullptr, *weights_ = nullptr;
};

}  // namespace saccade::SACCADE_TARGET
#endif
