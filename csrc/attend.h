// Cuts a problem into pieces, runs them on the threads and merges what was split.
#pragma once
#include <algorithm>

#include "decode.h"
#include "pool.h"
#include "prefill.h"

namespace saccade::SACCADE_TARGET {

constexpr int64_t kDecodeRows = 8;    // up to here reading the keys costs more than arithmetic
constexpr int64_t kPiecesPerThread = 4;  // for balance
constexpr int64_t kBlockRows = 384;

struct Work {
  const Problem* problem;
  Piece* pieces;
  Partials partials;
  int64_t num_pieces;
};

// Rows of a block: all that cache holds, fewer where that would leave threads without work.
static int64_t rows_per_block(const Problem& p) {
  int64_t rows = 0;
  for (int64_t i = 0; i < p.num_sequences; ++i)
    rows += p.sequences[i].q_len * p.group * p.kv_heads;
  // Row state grows with the head: 576-wide heads take the room of four 128-wide ones.
  const int64_t wide = most(p.head_dim, p.value_dim);
  const int64_t cached = least(kBlockRows, most(96, kBlockRows * 128 / wide));
  const int64_t fair = ceil_div(rows, p.threads * kPiecesPerThread);
  const int64_t chosen = p.threads > 1 ? most(96, least(cached, fair)) : cached;
  return ceil_div(chosen, kRows) * kRows;
}

static int64_t visible_keys(const Problem& p, const Sequence& s, const Piece& piece) {
  if (p.kv.kind == ViewKind::ragged)
    return p.kv.lengths[s.batch * p.kv.lengths_batch + piece.head * p.kv.lengths_head];
  Range ranges[2];
  const int n = mask_ranges(p, s.q_offset + piece.row_begin / p.group,
                            s.q_offset + (piece.row_end - 1) / p.group, s.k_len, ranges);
  return total_keys(ranges, n);
}

// Parts of the keys of each piece, so that every thread has some: depends on nothing but shapes.
static int64_t choose_splits(const Problem& p, int64_t num_pieces, int64_t keys) {
  if (p.threads == 1 || num_pieces == 0) return 1;
  const int64_t wanted = ceil_div(p.threads * kPiecesPerThread, num_pieces);
  return most(1, least(wanted, keys / (4 * kTile)));
}

template <class Visit>
static void each_block(const Problem& p, int64_t rows_per_block, Visit&& visit) {
  for (int64_t i = 0; i < p.num_sequences; ++i) {
    const int64_t rows = p.sequences[i].q_len * p.group;
    for (int64_t head = 0; head < p.kv_heads; ++head)
      for (int64_t row = 0; row < rows; row += rows_per_block)
        visit(Piece{i, head, row, least(row + rows_per_block, rows), 0, 1, 0, 0});
  }
}

struct Layout {
  int64_t blocks = 0, pieces = 0, partial_rows = 0, block_rows = 0;
};

static Layout measure(const Problem& p) {
  Layout layout;
  layout.block_rows = rows_per_block(p);
  each_block(p, layout.block_rows, [&](const Piece&) { ++layout.blocks; });
  each_block(p, layout.block_rows, [&](const Piece& piece) {
    const Sequence& s = p.sequences[piece.sequence];
    const int64_t splits = choose_splits(p, layout.blocks, visible_keys(p, s, piece));
    layout.pieces += splits;
    if (splits > 1) layout.partial_rows += splits * (piece.row_end - piece.row_begin);
  });
  return layout;
}

static void make_pieces(const Problem& p, const Layout& layout, Piece* pieces) {
  int64_t n = 0, partial = 0;
  each_block(p, layout.block_rows, [&](Piece piece) {
    const Sequence& s = p.sequences[piece.sequence];
    piece.splits = choose_splits(p, layout.blocks, visible_keys(p, s, piece));
    const int64_t rows = piece.row_end - piece.row_begin;
    piece.cost = rows * (visible_keys(p, s, piece) + 1) / piece.splits;
    piece.first_partial = partial;
    for (piece.split = 0; piece.split < piece.splits; ++piece.split) {
      pieces[n++] = piece;
      piece.first_partial += rows;
    }
    if (piece.splits > 1) partial += piece.splits * rows;
  });
}

static void run_piece(void* context, int64_t i) {
  const Work& work = *(const Work*)context;
  const Problem& p = *work.problem;
  const Piece& piece = work.pieces[i];
  if (p.sequences[piece.sequence].q_len * p.group <= kDecodeRows) {
    Decode(p, work.partials).run(piece);
  } else {
    Prefill(p, work.partials).run(piece);
  }
}

static void merge_piece(void* context, int64_t i) {
  const Work& work = *(const Work*)context;
  const Problem& p = *work.problem;
  const Piece& piece = work.pieces[i];
  if (piece.splits == 1 || piece.split != 0) return;
  const int64_t rows = piece.row_end - piece.row_begin;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = piece.row_begin + r;
    merge_row(p, p.sequences[piece.sequence], work.partials, piece.first_partial + r, rows,
              piece.splits, row / p.group, piece.head * p.group + row % p.group);
  }
}

static void attend(const Problem& p) {
  const Layout layout = measure(p);
  Work work{&p, nullptr, {}, layout.pieces};
  size_t bytes = 0;
  for (int pass = 0; pass < 2; ++pass) {
    Carver all(pass ? scratch(Scratch::call, bytes) : nullptr);
    work.pieces = all.take<Piece>(layout.pieces);
    work.partials = {all.take<float>(layout.partial_rows * p.value_dim),
                     all.take<float>(layout.partial_rows), all.take<float>(layout.partial_rows)};
    bytes = all.used();
  }
  make_pieces(p, layout, work.pieces);
  // The longest first, so that threads finish together.
  std::stable_sort(work.pieces, work.pieces + layout.pieces,
                   [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
  parallel_for(p.threads, layout.pieces, run_piece, &work);
  if (layout.partial_rows > 0) parallel_for(p.threads, layout.pieces, merge_piece, &work);
}

}  // namespace saccade::SACCADE_TARGET
