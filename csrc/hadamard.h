// Queries and outputs of views whose keys and values were stored Hadamard-transformed.
//
// The kernels know nothing of it: they read transformed copies of the queries, and what they wrote
// is transformed in its place.  The matrix is orthonormal and symmetric, so both transforms are the
// same (QuaRot, arXiv 2404.00456); a head is transformed in blocks of the largest power of two that
// divides it.
#pragma once
#include "output.h"
#include "pack.h"
#include "pool.h"
#include "rows.h"

namespace saccade::SACCADE_TARGET {

constexpr int kHadamardRows = 16;      // a multiple of W: rows are the lanes of the arithmetic
constexpr int64_t kFewHadamards = 16;  // up to so many groups of rows the caller does alone

// Rows [batch][head][query] of all sequences.
struct QueryRows {
  int64_t batch = 0, heads = 0, length = 0;

  explicit QueryRows(const Problem& p) : heads(p.heads) {
    for (int64_t i = 0; i < p.num_sequences; ++i) {
      const Sequence& s = p.sequences[i];
      batch = max(batch, s.batch + 1);
      length = max(length, s.q_begin + s.q_len);
    }
  }

  int64_t count() const { return batch * heads * length; }

  char* at(const Strided& x, int64_t row) const {
    const int64_t head = row / length % heads, b = row / length / heads;
    return x.data + b * x.batch + head * x.head + row % length * x.row;
  }
};

static int64_t item_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Bytes of the transformed queries.
static int64_t transformed_bytes(const Problem& p) {
  return QueryRows(p).count() * p.head_dim * item_bytes(p.q.dtype);
}

// Rows `first` to first + kHadamardRows of `from`, transformed, as rows of `to`.
struct Transform {
  QueryRows rows;
  Strided from, to;
  int dim;

  // x[channel][row], so that sums and differences of channels need no shuffles.
  void operator()(int64_t group) const {
    alignas(64) float x[kMaxDim][kHadamardRows], row[kDimPad];
    const int64_t first = group * kHadamardRows;
    const int n = (int)min((int64_t)kHadamardRows, rows.count() - first);
    for (int r = 0; r < n; ++r) {
      widen_row(from.dtype, rows.at(from, first + r), dim, 1.f, row);
      for (int d = 0; d < dim; ++d) x[d][r] = row[d];
    }
    for (int r = n; r < kHadamardRows; ++r)
      for (int d = 0; d < dim; ++d) x[d][r] = 0.f;
    const int block = dim & -dim;
    for (int at = 0; at < dim; at += block) transform_block(x + at, block);
    const float factor = 1.f / __builtin_sqrtf((float)block);
    for (int r = 0; r < n; ++r) {
      for (int d = 0; d < dim; ++d) row[d] = x[d][r];
      store_row(to.dtype, rows.at(to, first + r), row, factor, dim);
    }
  }

  static void transform_block(float (*x)[kHadamardRows], int block) {
    for (int half = 1; half < block; half *= 2)
      for (int at = 0; at < block; at += 2 * half)
        for (int d = at; d < at + half; ++d)
          for (int r = 0; r < kHadamardRows; r += W) {
            const F a = load(x[d] + r), b = load(x[d + half] + r);
            store(x[d] + r, add(a, b));
            store(x[d + half] + r, sub(a, b));
          }
  }
};

static void run_transform(const Problem& p, const Transform& transform) {
  const int64_t groups = ceil_div(transform.rows.count(), kHadamardRows);
  parallel_for(groups <= kFewHadamards ? 1 : p.threads, groups,
               [](void* t, int64_t group) { (*(const Transform*)t)(group); }, (void*)&transform);
}

// Makes `memory` the queries of the problem: [batch][head][query][head_dim].
static void transform_queries(Problem& p, char* memory) {
  const QueryRows rows(p);
  const int64_t row = p.head_dim * item_bytes(p.q.dtype);
  const Strided copy{memory, p.q.dtype, rows.heads * rows.length * row, rows.length * row, row};
  run_transform(p, {rows, p.q, copy, (int)p.head_dim});
  p.q = copy;
}

static void transform_outputs(const Problem& p) {
  run_transform(p, {QueryRows(p), p.out, p.out, (int)p.value_dim});
}

}  // namespace saccade::SACCADE_TARGET
