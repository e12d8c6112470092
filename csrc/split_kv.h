// Split-KV: the partial results of work items that read a part of the keys, and how they combine.
#pragma once
#include "output.h"
#include "work_items.h"

namespace saccade::SACCADE_TARGET {

// Unnormalized results, one row each: the output is o / l, the sum of exponentials l * 2^m.
struct Partials {
  float* o;  // [rows][value_dim]
  float* m;  // [rows], in powers of two
  float* l;  // [rows]
  int64_t* received;  // see received.h
};

// The end of row `i` of an item: its output, or a partial result where the keys are split.
SACCADE_INLINE void finish_row(const Problem& p, const WorkItem& item, const Partials& partials,
                               int i, const Row& row, const float* o, float m, float l) {
  if (item.splits == 1)
    return write_row(p, p.sequences[item.sequence], row.query, row.head, o, m, l);
  const int64_t at = item.first_partial + i;
  partials.m[at] = m;
  partials.l[at] = l;
  std::memcpy(partials.o + at * p.value_dim, o, p.value_dim * sizeof(float));
}

// Combines the splits of one row, which lie `stride` rows apart from `first` on, and writes it.
static void combine_row(const Problem& p, const Sequence& s, const Partials& parts, int64_t first,
                        int64_t stride, int64_t splits, int64_t query, int64_t head) {
  alignas(64) float o[kMaxDim + W] = {};
  float m = -kInf, l = 0.f;
  for (int64_t i = 0; i < splits; ++i) {
    const float x = parts.m[first + i * stride];
    m = x > m || x != x ? x : m;
  }
  const float anchor = m == -kInf ? 0.f : m;
  const int dim = (int)p.value_dim;
  for (int64_t i = 0; i < splits; ++i) {
    const int64_t at = first + i * stride;
    alignas(64) float weight[W];
    store(weight, exp2_negative(sub(set1(parts.m[at]), set1(anchor))));
    if (parts.l[at] == 0.f) continue;
    l += parts.l[at] * weight[0];
    const float* part = parts.o + at * p.value_dim;
    for (int d = 0; d < dim; ++d) o[d] += part[d] * weight[0];
  }
  write_row(p, s, query, head, o, m, l);
}

}  // namespace saccade::SACCADE_TARGET
