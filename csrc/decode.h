// A few queries against many keys: the work is reading the keys once, so nothing is packed.
//
// All rows of a group (query heads x queries, at most 8) share each key that is loaded.  How scores
// and weighted sums are computed depends on the storage: decode_plain.h, decode_quantized.h.
#pragma once
#include "decode_quantized.h"
#include "workspace.h"

namespace saccade::SACCADE_TARGET {

class Decode : DecodeQuantized {
 public:
  Decode(const Problem& p, const Partials& partials) : DecodeQuantized(p, partials) {}

  // Bytes of the workspace that `run(item)` takes; everything else lies on the stack.
  static int64_t workspace_bytes(const Problem& p, const WorkItem& item) {
    return max_ranges(p, p.sequences[item.sequence]) * (int64_t)sizeof(Range);
  }

  void run(const WorkItem& item) {
    start_rows(item);
    auto* ranges = (Range*)workspace(WorkspaceSlot::item, (size_t)workspace_bytes(p_, item));
    const int64_t num_ranges =
        visited_ranges(p_, *sequence_, item.head, item.row_begin / p_.group,
                       (item.row_end - 1) / p_.group, ranges);
    const Range part = split_range(total_keys(ranges, num_ranges), item.split, item.splits);
    TileWalk walk(p_, *sequence_, item.head, ranges, num_ranges, part.start,
                  part.stop - part.start);
    // The next tile is found before one is computed, so that it can be prefetched meanwhile.
    bool more = walk.next(tiles_[0]);
    for (int current = 0; more; current ^= 1) {
      more = walk.next(tiles_[current ^ 1]);
      if (!more) tiles_[current ^ 1].count = 0;
      set_tiles(tiles_[current], tiles_[current ^ 1]);
      process_tile();
    }
    write();
  }

 private:
  void process_tile() {
    const bool all = !masked_by_row() &&
                     all_visible(rows_[0], rows_[num_rows_ - 1], (int32_t)p_.sinks, *tile_);
    tile_full_ = all && !tile_->holes && tile_->count % kTilePad == 0;
    values_finite_ = all || check_values();
    each_group([&]<int R>(int row) { score<R>(row); });
    each_group([&]<int R>(int row) { update_softmax<R>(row); });
    if (tile_->quantized) prepare_values(values_finite_);
    each_group([&]<int R>(int row) { accumulate<R>(row); });
  }

  template <int R>
  void score(int row) {
    if (!tile_->quantized) return score_plain<R>(row);
    if (p_.kv.quantized_k.bits == 8) return score_quantized<Plain<uint8_t>, R>(row);
    return score_quantized<Nibbles, R>(row);
  }

  template <int R>
  void update_softmax(int row) {
    const Scoring how{!tile_full_, p_.alibi != nullptr, p_.softcap * kLog2e, (int32_t)p_.sinks};
    online_softmax<R>(Softmax{m_, alpha_, l_[0]}, row, rows_, how,
                      [&](int i) { return positions_of(row + i); }, scores_[row], kScoreStride, 0,
                      padded_count());
  }

  template <int R>
  void accumulate(int row) {
    if (!values_finite_) return accumulate_visible<R>(row);
    if (!tile_->quantized) return accumulate_plain<R>(row);
    if (!values_by_group_) return accumulate_visible<R>(row);
    if (p_.kv.quantized_v.bits == 8) return accumulate_quantized<Plain<uint8_t>, R>(row);
    return accumulate_quantized<Nibbles, R>(row);
  }

  // Key by key, where a masked value may be NaN or infinite, and for unusual group sizes.
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

  // Whether all values are finite; needed only for tiles of which a part is masked.
  bool check_values() {
    F nan_probe = zero();
    for (int j = 0; j < tile_->count; ++j) {
      widen_value(j);
      for (int d = 0; d < (int)p_.value_dim; d += W)
        nan_probe = fma(load(value_ + d), zero(), nan_probe);
    }
    return hsum(nan_probe) == 0.f;
  }

  void widen_value(int j) {
    const int dim = (int)p_.value_dim;
    if (tile_->quantized) {
      const QuantizedTensor& c = p_.kv.quantized_v;
      if (tile_->positions[j] == kNoKey) {
        std::memset(value_, 0, sizeof value_);
      } else {
        dequantize_value(c, offset_of(c.scale), offset_of(c.offset), *tile_, j, dim, value_);
      }
      return;
    }
    widen_row(p_.kv.v.dtype, tile_->v[j], dim, 1.f, value_);
  }

  int64_t offset_of(const Strided& s) const {
    return sequence_->batch * s.batch + item_->head * s.head;
  }

  void write() {
    for (int i = 0; i < num_rows_; ++i) {
      if (o_in_pairs()) join_pairs(o_[i], (int)p_.value_dim);
      finish_row(p_, *item_, partials_, i, rows_[i], o_[i], m_[i], hsum(load(l_[i])));
    }
  }

  bool tile_full_ = false, values_finite_ = true;
  alignas(64) float value_[kDimPad];
  Tile tiles_[2];
};

}  // namespace saccade::SACCADE_TARGET
