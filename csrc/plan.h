// Which part of an attention problem is one piece of work, and which keys it has to visit.
//
// The rows of a piece are (query, head of the group) pairs with the query outermost, so the query
// heads that share a KV head share every tile of keys.  A piece may see only a part of its keys
// (split): its unnormalised result is then merged with the others by log-sum-exp.
#pragma once
#include "problem.h"
#include "views.h"

namespace saccade::SACCADE_TARGET {

struct Piece {
  int64_t sequence, head;  // KV head
  int64_t row_begin, row_end;
  int64_t split, splits;
  int64_t first_partial;  // row of the partial results, where splits > 1
  int64_t cost;
};

SACCADE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SACCADE_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
SACCADE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Mask.key_ranges: the key ranges that queries at positions [first_q, last_q] may see.
SACCADE_INLINE int mask_ranges(const Problem& p, int64_t first_q, int64_t last_q, int64_t keys,
                               Range* out) {
  const int64_t stop = p.causal ? most(0, least(keys, last_q + 1)) : keys;
  const int64_t start = p.window == kUnlimited ? 0 : least(most(0, first_q - p.window + 1), stop);
  const int64_t sinks = least(p.sinks, start);
  int n = 0;
  if (sinks == start) {
    if (stop > 0) out[n++] = {0, stop};
    return n;
  }
  if (sinks > 0) out[n++] = {0, sinks};
  if (start < stop) out[n++] = {start, stop};
  return n;
}

SACCADE_INLINE bool block_allowed(const Problem& p, int64_t batch, int64_t head, int64_t q_block,
                                  int64_t k_block) {
  const ByteGrid& g = p.blocks;
  return g.data[batch * g.batch + head * g.head + q_block * g.row + k_block * g.column];
}

// Most ranges a piece can have.
SACCADE_INLINE int64_t max_ranges(const Problem& p, const Sequence& s) {
  return 2 + (p.blocks.data ? s.k_len / p.k_block + 2 : 0);
}

// The ranges of view positions that rows [row_begin, row_end) have to visit, ascending.
static int64_t visited_ranges(const Problem& p, const Sequence& s, const Piece& piece, Range* out) {
  const int64_t head = piece.head;
  if (p.kv.kind == ViewKind::ragged) {  // positions are in no order: every slot is visited
    const int64_t n = p.kv.lengths[s.batch * p.kv.lengths_batch + head * p.kv.lengths_head];
    out[0] = {0, n};
    return n > 0;
  }
  const int64_t first = piece.row_begin / p.group, last = (piece.row_end - 1) / p.group;
  Range ranges[2];
  const int n = mask_ranges(p, s.q_offset + first, s.q_offset + last, s.k_len, ranges);
  if (!p.blocks.data) {
    for (int i = 0; i < n; ++i) out[i] = ranges[i];
    return n;
  }
  int64_t count = 0;
  for (int i = 0; i < n; ++i) {
    for (int64_t b = ranges[i].start / p.k_block; b * p.k_block < ranges[i].stop; ++b) {
      bool wanted = false;
      for (int64_t a = first / p.q_block; a <= last / p.q_block && !wanted; ++a)
        wanted = block_allowed(p, s.batch, head, a, b);
      if (!wanted) continue;
      const int64_t start = most(ranges[i].start, b * p.k_block);
      const int64_t stop = least(ranges[i].stop, (b + 1) * p.k_block);
      if (count > 0 && out[count - 1].stop == start) {
        out[count - 1].stop = stop;
      } else {
        out[count++] = {start, stop};
      }
    }
  }
  return count;
}

SACCADE_INLINE int64_t total_keys(const Range* ranges, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += ranges[i].stop - ranges[i].start;
  return total;
}

// The part of `total` keys that a split takes, in whole tiles.
SACCADE_INLINE Range split_part(int64_t total, int64_t split, int64_t splits) {
  const int64_t tiles = ceil_div(total, kTile);
  return {least(total, tiles * split / splits * kTile),
          least(total, tiles * (split + 1) / splits * kTile)};
}

// Rough number of (row, key) pairs of a piece, enough to order the work.
SACCADE_INLINE int64_t piece_cost(const Problem& p, const Sequence& s, const Piece& piece) {
  const int64_t rows = piece.row_end - piece.row_begin;
  Range ranges[2];
  const int n = mask_ranges(p, s.q_offset + piece.row_begin / p.group,
                            s.q_offset + (piece.row_end - 1) / p.group, s.k_len, ranges);
  return rows * (total_keys(ranges, n) + 1) / piece.splits;
}

}  // namespace saccade::SACCADE_TARGET
