// Iterates over the keys of a view tile by tile, in the order of positions, without copying them.
//
// A Tile is a list of pointers: where each key and value lies and which position it has.  A slot
// that must not be read (padding, an empty slot, one past the end) points at zeros and has the
// position `kNoKey`, which no query attends to.
#pragma once
#include <cstdint>

#include "key_ranges.h"
#include "problem.h"
#include "simd.h"

namespace saccade::SACCADE_TARGET {

constexpr int kTile = 128;    // keys of a tile
constexpr int kTilePad = 32;  // kernels may read this far past the end
constexpr int32_t kNoKey = INT32_MAX;            // position of a slot without a key
constexpr int32_t kAnyPosition = INT32_MAX - 1;  // last position that a non-causal query attends to

constexpr int kDimPad = kMaxDim + 32;  // rows in a workspace are padded to full registers

struct Tile {
  int count;          // slots; the next kTilePad entries are kNoKey
  bool quantized;
  bool holes;         // some slot below `count` is kNoKey
  int32_t low, high;  // smallest and largest position of the others
  alignas(64) int32_t positions[kTile + kTilePad];
  const char* k[kTile + kTilePad];
  const char* v[kTile + kTilePad];
  int64_t token[kTile + kTilePad];  // quantized: index of the token, for its scales
};

alignas(64) inline constexpr char kZeros[4096] = {};

class TileWalk {
 public:
  // Iterates over the positions of `ranges` from the `skip`-th on, `take` of them.
  TileWalk(const Problem& problem, const Sequence& sequence, int64_t kv_head, const Range* ranges,
          int64_t num_ranges, int64_t skip, int64_t take)
      : p_(problem), s_(sequence), head_(kv_head), range_(ranges), end_(ranges + num_ranges),
        left_(take) {
    while (range_ != end_ && skip >= range_->stop - range_->start) {
      skip -= range_->stop - range_->start;
      ++range_;
    }
    at_ = range_ != end_ ? range_->start + skip : 0;
  }

  // Fills the next tile; false when there is none.
  bool next(Tile& tile) {
    tile.count = 0;
    tile.holes = false;
    tile.quantized = false;
    tile.low = kNoKey;
    tile.high = -1;
    while (tile.count < kTile && left_ > 0 && range_ != end_) {
      int64_t stop = range_->stop < at_ + left_ ? range_->stop : at_ + left_;
      int64_t room = kTile - tile.count;
      if (stop > at_ + room) stop = at_ + room;
      int64_t done = append(tile, at_, stop);
      if (done == 0) break;  // the recent tokens of a quantized view start a new tile
      at_ += done;
      left_ -= done;
      if (at_ == range_->stop && ++range_ != end_) at_ = range_->start;
    }
    finish(tile);
    return tile.count > 0;
  }

 private:
  // Appends view positions from `start`, returns how many of them are done.
  int64_t append(Tile& tile, int64_t start, int64_t stop) {
    switch (p_.kv.kind) {
      case ViewKind::dense: return append_dense(tile, start, stop);
      case ViewKind::paged: return append_paged(tile, start, stop);
      case ViewKind::ragged: return append_ragged(tile, start, stop);
      default: return append_quantized(tile, start, stop);
    }
  }

  int64_t append_dense(Tile& tile, int64_t start, int64_t stop) {
    const View& kv = p_.kv;
    const int64_t first = s_.k_begin + start, last = s_.k_begin + stop;
    while (span_ < kv.num_spans && kv.spans[span_].position + kv.spans[span_].length <= first)
      ++span_;
    if (span_ == kv.num_spans) return stop - start;
    const Span& span = kv.spans[span_];
    if (span.position >= last) return stop - start;  // a gap between spans
    if (span.position > first) return span.position - first;
    int64_t span_stop = span.position + span.length;
    int64_t count = (last < span_stop ? last : span_stop) - first;
    int64_t slot = span.slot + first - span.position;
    const char* k = kv.k.data + s_.batch * kv.k.batch + head_ * kv.k.head + slot * kv.k.row;
    const char* v = kv.v.data + s_.batch * kv.v.batch + head_ * kv.v.head + slot * kv.v.row;
    put_run(tile, start, count, k, kv.k.row, v, kv.v.row);
    return count;
  }

  int64_t append_paged(Tile& tile, int64_t start, int64_t stop) {
    const View& kv = p_.kv;
    const int32_t* table = kv.table + s_.batch * kv.table_batch;
    for (int64_t at = start; at < stop;) {
      const int64_t page = table[at / kv.page_size], slot = at % kv.page_size;
      const int64_t rest = kv.page_size - slot, count = rest < stop - at ? rest : stop - at;
      put_run(tile, at, count, kv.k.data + page * kv.k.batch + head_ * kv.k.head + slot * kv.k.row,
              kv.k.row, kv.v.data + page * kv.v.batch + head_ * kv.v.head + slot * kv.v.row,
              kv.v.row);
      at += count;
    }
    return stop - start;
  }

  int64_t append_ragged(Tile& tile, int64_t start, int64_t stop) {
    const View& kv = p_.kv;
    const int32_t* table = kv.table + s_.batch * kv.table_batch + head_ * kv.table_head;
    for (int64_t at = start; at < stop; ++at) {
      int64_t page = table[at / kv.page_size], slot = at % kv.page_size;
      int32_t position = kv.positions[page * kv.positions_page + slot];
      if (position >= s_.k_len) position = -1;
      put(tile, position, kv.k.data + page * kv.k.batch + slot * kv.k.row,
          kv.v.data + page * kv.v.batch + slot * kv.v.row);
    }
    return stop - start;
  }

  int64_t append_quantized(Tile& tile, int64_t start, int64_t stop) {
    const View& kv = p_.kv;
    const bool quantized = start < kv.num_quantized;
    if (tile.count > 0 && quantized != tile.quantized) return 0;
    tile.quantized = quantized;
    const Strided& k = quantized ? kv.quantized_k.qdata : kv.k;
    const Strided& v = quantized ? kv.quantized_v.qdata : kv.v;
    if (quantized && stop > kv.num_quantized) stop = kv.num_quantized;
    const int64_t base = quantized ? 0 : kv.num_quantized;
    const char* first_k = k.data + s_.batch * k.batch + head_ * k.head + (start - base) * k.row;
    const char* first_v = v.data + s_.batch * v.batch + head_ * v.head + (start - base) * v.row;
    for (int64_t at = start; at < stop; ++at) tile.token[tile.count + at - start] = at;
    put_run(tile, start, stop - start, first_k, k.row, first_v, v.row);
    return stop - start;
  }

  // `count` consecutive positions whose rows lie at fixed strides.
  void put_run(Tile& tile, int64_t position, int64_t count, const char* k, int64_t k_stride,
               const char* v, int64_t v_stride) {
    if (p_.key_padding.data) {
      for (int64_t i = 0; i < count; ++i)
        put(tile, position + i, k + i * k_stride, v + i * v_stride);
      return;
    }
    int32_t* positions = tile.positions + tile.count;
    const char **k_out = tile.k + tile.count, **v_out = tile.v + tile.count;
    for (int i = 0; i < (int)count; ++i) positions[i] = (int32_t)position + i;
    for (int64_t i = 0; i < count; ++i) k_out[i] = k + i * k_stride;
    for (int64_t i = 0; i < count; ++i) v_out[i] = v + i * v_stride;
    tile.count += (int)count;
    note(tile, (int32_t)position);
    note(tile, (int32_t)(position + count - 1));
  }

  static void note(Tile& tile, int32_t position) {
    tile.low = position < tile.low ? position : tile.low;
    tile.high = position > tile.high ? position : tile.high;
  }

  void put(Tile& tile, int64_t position, const char* k, const char* v) {
    const int i = tile.count++;
    const ByteGrid& padding = p_.key_padding;
    bool real = position >= 0;
    if (real && padding.data)
      real = padding.data[s_.batch * padding.batch + position * padding.column];
    tile.positions[i] = real ? (int32_t)position : kNoKey;
    tile.k[i] = real ? k : kZeros;
    tile.v[i] = real ? v : kZeros;
    tile.holes |= !real;
    if (real) note(tile, (int32_t)position);
  }

  void finish(Tile& tile) {
    for (int i = tile.count; i < tile.count + kTilePad; ++i) {
      tile.positions[i] = kNoKey;
      tile.k[i] = tile.v[i] = kZeros;
    }
  }

  const Problem& p_;
  const Sequence& s_;
  int64_t head_;
  const Range* range_;
  const Range* end_;
  int64_t at_, left_;
  int64_t span_ = 0;
};

}  // namespace saccade::SACCADE_TARGET
