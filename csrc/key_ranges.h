// Which keys of a sequence some queries attend to: ranges of positions, from the mask and from
// block-sparse selection.
#pragma once
#include "intmath.h"
#include "problem.h"

namespace saccade::SACCADE_TARGET {

struct Range {
  int64_t start, stop;
};

// The same as Mask.key_ranges in Python: the keys that the mask leaves to queries at positions
// [first_q, last_q], as up to two ascending ranges (attention sinks, window).
SACCADE_INLINE int mask_ranges(const Problem& p, int64_t first_q, int64_t last_q, int64_t keys,
                               Range* out) {
  const int64_t stop = p.causal ? max(0, min(keys, last_q + 1)) : keys;
  const int64_t start = p.window == kUnlimited ? 0 : min(max(0, first_q - p.window + 1), stop);
  const int64_t sinks = min(p.sinks, start);
  int n = 0;
  if (sinks == start) {
    if (stop > 0) out[n++] = {0, stop};
    return n;
  }
  if (sinks > 0) out[n++] = {0, sinks};
  if (start < stop) out[n++] = {start, stop};
  return n;
}

SACCADE_INLINE bool has_blocks(const Problem& p) { return p.q_block > 0; }

SACCADE_INLINE bool block_allowed(const Problem& p, int64_t batch, int64_t head, int64_t q_block,
                                  int64_t k_block) {
  const ByteGrid& g = p.blocks;
  return g.data[batch * g.batch + head * g.head + q_block * g.row + k_block * g.column];
}

// Whether every block of keys is selected by every block of queries.
static bool selects_all(const Problem& p) {
  for (int64_t i = 0; i < p.num_sequences; ++i) {
    const Sequence& s = p.sequences[i];
    for (int64_t head = 0; head < p.kv_heads; ++head)
      for (int64_t a = 0; a * p.q_block < s.q_len; ++a)
        for (int64_t b = 0; b * p.k_block < s.k_len; ++b)
          if (!block_allowed(p, s.batch, head, a, b)) return false;
  }
  return true;
}

// Upper bound of the ranges of `visited_ranges`.
SACCADE_INLINE int64_t max_ranges(const Problem& p, const Sequence& s) {
  return 2 + (has_blocks(p) ? s.k_len / p.k_block + 2 : 0);
}

// Narrows `ranges` to the blocks of keys that some query of [first, last] selects.
static int64_t selected_ranges(const Problem& p, const Sequence& s, int64_t head, int64_t first,
                               int64_t last, const Range* ranges, int n, Range* out) {
  int64_t count = 0;
  for (int i = 0; i < n; ++i) {
    for (int64_t b = ranges[i].start / p.k_block; b * p.k_block < ranges[i].stop; ++b) {
      bool wanted = false;
      for (int64_t a = first / p.q_block; a <= last / p.q_block && !wanted; ++a)
        wanted = block_allowed(p, s.batch, head, a, b);
      if (!wanted) continue;
      const int64_t start = max(ranges[i].start, b * p.k_block);
      const int64_t stop = min(ranges[i].stop, (b + 1) * p.k_block);
      if (count > 0 && out[count - 1].stop == start) {
        out[count - 1].stop = stop;
      } else {
        out[count++] = {start, stop};
      }
    }
  }
  return count;
}

// Keys of a (sequence, KV head) of a ragged view, whose slots are in no order of positions.
SACCADE_INLINE int64_t ragged_keys(const Problem& p, const Sequence& s, int64_t head) {
  return p.kv.lengths[s.batch * p.kv.lengths_batch + head * p.kv.lengths_head];
}

// The ascending ranges of view positions that the queries [first, last] of a KV head attend to.
static int64_t visited_ranges(const Problem& p, const Sequence& s, int64_t head, int64_t first,
                              int64_t last, Range* out) {
  if (p.kv.kind == ViewKind::ragged) {
    out[0] = {0, ragged_keys(p, s, head)};
    return out[0].stop > 0;
  }
  Range ranges[2];
  const int n = mask_ranges(p, s.q_offset + first, s.q_offset + last, s.k_len, ranges);
  if (has_blocks(p)) return selected_ranges(p, s, head, first, last, ranges, n, out);
  for (int i = 0; i < n; ++i) out[i] = ranges[i];
  return n;
}

SACCADE_INLINE int64_t total_keys(const Range* ranges, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += ranges[i].stop - ranges[i].start;
  return total;
}

}  // namespace saccade::SACCADE_TARGET
