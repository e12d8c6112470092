// One row of a work item: a (query, query head) pair, which keys it attends to, and its data.
#pragma once
#include "intmath.h"
#include "problem.h"
#include "tiles.h"

namespace saccade::SACCADE_TARGET {

struct Row {
  int32_t position;
  int32_t last;   // attends to positions <= last ...
  int32_t after;  // ... that are > after (the window) or < sinks
  float slope;    // ALiBi, times log2(e)
  int64_t query;  // index in its sequence
  int64_t head;   // query head
};

SACCADE_INLINE Row make_row(const Problem& p, const Sequence& s, int64_t kv_head, int64_t row) {
  const int64_t query = row / p.group, head = kv_head * p.group + row % p.group;
  const int64_t at = s.q_offset + query;
  return {(int32_t)at,
          p.causal ? (int32_t)at : kAnyPosition,
          p.window != kUnlimited ? (int32_t)max(at - p.window, INT32_MIN) : INT32_MIN,
          p.alibi ? p.alibi[s.batch * p.alibi_batch + head] * kLog2e : 0.f,
          query,
          head};
}

// A row of q, or of a tensor with the same batch, heads and queries.
SACCADE_INLINE const char* row_data(const Strided& x, const Sequence& s, const Row& row) {
  return x.data + s.batch * x.batch + row.head * x.head + (s.q_begin + row.query) * x.row;
}

// What scores are multiplied by before softcap and exponential: both work in powers of two.
SACCADE_INLINE float query_factor(const Problem& p) {
  return p.softcap != 0.f ? p.scale / p.softcap : p.scale * kLog2e;
}

SACCADE_INLINE M visible_lanes(const Row& row, int32_t sinks, I positions) {
  const M in_window = either(gt(positions, set1i(row.after)), gt(set1i(sinks), positions));
  return both(negate(gt(positions, set1i(row.last))), in_window);
}

SACCADE_INLINE bool is_visible(const Row& row, int32_t sinks, int32_t position) {
  return position <= row.last && (position > row.after || position < sinks);
}

// Whether rows low .. high (in the order of positions) attend to every key of a tile.
SACCADE_INLINE bool all_visible(const Row& low, const Row& high, int32_t sinks, const Tile& tile) {
  return tile.high <= low.last && (tile.low > high.after || tile.high < sinks);
}

struct Columns {
  int begin, end;
};

// Columns of a tile from the first to one past the last that some row of low .. high attends to.
SACCADE_INLINE Columns visible_columns(const Row& low, const Row& high, int32_t sinks,
                                       const Tile& tile) {
  int begin = 0, end = tile.count;
  auto in_reach = [&](int32_t at) { return at <= high.last && (at > low.after || at < sinks); };
  while (end > begin && !in_reach(tile.positions[end - 1])) --end;
  while (begin < end && !in_reach(tile.positions[begin])) ++begin;
  return {begin, end};
}

}  // namespace saccade::SACCADE_TARGET
