// How a call is cut into work items that threads compute independently.
//
// The rows of an item are (query, query head of the group) pairs with the query outermost, so the
// query heads that share a KV head share every tile of keys.  With few rows the keys of an item are
// split as well (split-KV); split_kv.h combines the partial results by log-sum-exp.
#pragma once
#include "key_ranges.h"
#include "micro_kernel.h"
#include "tiles.h"

namespace saccade::SACCADE_TARGET {

constexpr int64_t kDecodeRows = 8;      // up to here reading the keys costs more than arithmetic
constexpr int64_t kItemsPerThread = 4;  // for balance
constexpr int64_t kBlockRows = 384;
constexpr int64_t kKeptWeights = 1 << 18;  // of a block, for received.h: the second cache's size

struct WorkItem {
  int64_t sequence, head;  // KV head
  int64_t row_begin, row_end;
  int64_t split, splits;
  int64_t first_partial;  // row of the partial results, where splits > 1
  int64_t cost;           // (row, key) pairs, roughly

  int64_t num_rows() const { return row_end - row_begin; }
};

SACCADE_INLINE bool is_decode(const Problem& p, const WorkItem& item) {
  return !p.receives && p.sequences[item.sequence].q_len * p.group <= kDecodeRows;
}

// About `most` rows that end where a block of queries does, `unit` rows each, or divide one evenly.
static int64_t rows_of_blocks(int64_t unit, int64_t most) {
  if (unit <= most) return most / unit * unit;
  int64_t parts = ceil_div(unit, most);
  while (unit % parts) ++parts;
  return unit / parts >= kDecodeRows ? unit / parts : unit;
}

// Rows of a block: all that cache holds, fewer where that would leave threads without work.
static int64_t rows_per_block(const Problem& p) {
  int64_t rows = 0, longest = 0;
  for (int64_t i = 0; i < p.num_sequences; ++i) {
    rows += p.sequences[i].q_len * p.group * p.kv_heads;
    longest = max(longest, p.sequences[i].k_len);
  }
  // Row state grows with the head: 576-wide heads take the room of four 128-wide ones.
  const int64_t wide = max(p.head_dim, p.value_dim);
  int64_t cached = min(kBlockRows, max(96, kBlockRows * 128 / wide));
  if (p.receives) cached = min(cached, max(96, kKeptWeights / max(1, longest)));
  const int64_t fair = ceil_div(rows, p.threads * kItemsPerThread);
  const int64_t chosen = p.threads > 1 ? max(96, min(cached, fair)) : cached;
  if (has_blocks(p)) return rows_of_blocks(p.q_block * p.group, chosen);
  return ceil_div(chosen, kRowStep) * kRowStep;
}

// Keys that the mask leaves to the rows of an item; block selection is not counted.
static int64_t visible_keys(const Problem& p, const WorkItem& item) {
  const Sequence& s = p.sequences[item.sequence];
  if (p.kv.kind == ViewKind::ragged) return ragged_keys(p, s, item.head);
  Range ranges[2];
  const int n = mask_ranges(p, s.q_offset + item.row_begin / p.group,
                            s.q_offset + (item.row_end - 1) / p.group, s.k_len, ranges);
  return total_keys(ranges, n);
}

// Splits of the keys of each block, so that every thread has work: shapes alone decide.
static int64_t choose_splits(const Problem& p, int64_t blocks, int64_t keys) {
  if (p.threads == 1 || p.receives || blocks == 0) return 1;
  const int64_t wanted = ceil_div(p.threads * kItemsPerThread, blocks);
  return max(1, min(wanted, keys / (4 * kTile)));
}

// The part of `total` keys that a split takes, in full tiles.
SACCADE_INLINE Range split_range(int64_t total, int64_t split, int64_t splits) {
  const int64_t tiles = ceil_div(total, kTile);
  return {min(total, tiles * split / splits * kTile),
          min(total, tiles * (split + 1) / splits * kTile)};
}

template <class Visit>
static void each_block(const Problem& p, int64_t block_rows, Visit&& visit) {
  for (int64_t i = 0; i < p.num_sequences; ++i) {
    const int64_t rows = p.sequences[i].q_len * p.group;
    for (int64_t head = 0; head < p.kv_heads; ++head)
      for (int64_t row = 0; row < rows; row += block_rows)
        visit(WorkItem{i, head, row, min(row + block_rows, rows), 0, 1, 0, 0});
  }
}

// Sizes of the list of work items and of their partial results.
struct Partition {
  int64_t block_rows = 0, blocks = 0, items = 0, partial_rows = 0;
};

static Partition partition(const Problem& p) {
  Partition sizes;
  sizes.block_rows = rows_per_block(p);
  each_block(p, sizes.block_rows, [&](const WorkItem&) { ++sizes.blocks; });
  each_block(p, sizes.block_rows, [&](const WorkItem& item) {
    const int64_t splits = choose_splits(p, sizes.blocks, visible_keys(p, item));
    sizes.items += splits;
    if (splits > 1) sizes.partial_rows += splits * item.num_rows();
  });
  return sizes;
}

static void list_items(const Problem& p, const Partition& sizes, WorkItem* items) {
  int64_t n = 0, partial = 0;
  each_block(p, sizes.block_rows, [&](WorkItem item) {
    const int64_t keys = visible_keys(p, item), rows = item.num_rows();
    item.splits = choose_splits(p, sizes.blocks, keys);
    item.cost = rows * (keys + 1) / item.splits;
    item.first_partial = partial;
    for (item.split = 0; item.split < item.splits; ++item.split) {
      items[n++] = item;
      item.first_partial += rows;
    }
    if (item.splits > 1) partial += item.splits * rows;
  });
}

}  // namespace saccade::SACCADE_TARGET
