// Which blocks of keys the layers of a step read: selected by a layer, or by one before it.
#include <algorithm>

#include "check_tensor.h"
#include "checks.h"
#include "decoder.h"
#include "layer.h"
#include "selection_arguments.h"

namespace saccade {

TensorArg by_heads(std::vector<float>& x, int64_t batch, int64_t heads, int64_t tokens,
                   int64_t dim) {
  TensorArg arg{(char*)x.data(), Dtype::f32, 4, {batch, heads, tokens, dim}, {}, 0};
  const int64_t strides[] = {tokens * heads * dim, dim, heads * dim, 1};
  std::copy(strides, strides + 4, arg.stride);
  arg.reach = (int64_t)(x.size() * sizeof(float));
  return arg;
}

// `fields`: (rule, summaries or None, None or (anchor, heads)), see Decoder::stored.
void Decoder::read_selection(int64_t i, nb::tuple fields, Stored& found) const {
  require(fields.size() == 3, "a selection is (rule, summaries, reuse).");
  found.rule = read_rule(fields[0]);
  if (!fields[1].is_none()) found.summaries = tensor(fields[1]);
  require(found.rule->summary != Summary::keys ||
              (found.view.kind == ViewKind::dense && !found.storing.hadamard),
          "keys are scored as they lie in a dense view.");
  if (fields[2].is_none()) return;
  const nb::tuple reuse = nb::cast<nb::tuple>(fields[2]);
  require(reuse.size() == 2, "a reuse is (anchor, heads).");
  found.anchor = integer(reuse[0]);
  require(*found.anchor >= 0 && *found.anchor < i, "blocks are those of a layer before.");
  const nb::tuple heads = nb::cast<nb::tuple>(reuse[1]);
  require((int64_t)heads.size() == layer(i).kv_heads, "every KV head needs one of the anchor.");
  for (nb::handle each : heads) {
    found.heads.push_back(integer(each));
    require(found.heads.back() >= 0 && found.heads.back() < layer(*found.anchor).kv_heads,
            "the anchor has no such KV head.");
  }
}

// The blocks of keys that the queries of layer i read, all of them as one block of queries.
void Decoder::select(int64_t i, LayerCall& call) {
  const Layer& at = layers_[(size_t)i];
  const Stored& stored = stored_[(size_t)i];
  BlockRule rule = *stored.rule;
  rule.q_block = tokens_;
  CallArg& attention = call.attention;
  const int64_t keys = attention.q_offset + tokens_;
  if (keys < rule.least) return;
  const int64_t n = (keys + rule.k_block - 1) / rule.k_block, size = batch_ * at.kv_heads * n;
  Chosen& own = chosen_[(size_t)i];
  own.grid.resize((size_t)size);
  const TensorArg grid{(char*)own.grid.data(), Dtype::boolean, 4, {batch_, at.kv_heads, 1, n},
                       {at.kv_heads * n, n, n, 1}, size};
  if (stored.anchor) {
    copy_chosen(*stored.anchor, stored.heads, n, own.grid);
  } else {
    const bool exact = rule.summary == Summary::keys;
    require(!exact || attention.kv.spans.empty(), "keys are scored where slots are positions.");
    const TensorArg q = by_heads(q_, batch_, at.heads, tokens_, at.head_dim);
    const std::optional<TensorArg> rows = exact ? attention.kv.k : stored.summaries;
    kernels_->step->select_blocks(make_selecting(rule, q, attention.q_offset, rows,
                                                 exact ? keys : call.blocks, grid, threads_));
    own.step = step_;
  }
  attention.blocks = grid;
  attention.q_block = rule.q_block;
  attention.k_block = rule.k_block;
}

// The blocks that an anchor chose in this step, for each KV head those of one of its own.
void Decoder::copy_chosen(int64_t anchor, const std::vector<int64_t>& heads, int64_t n,
                          std::vector<uint8_t>& to) const {
  const Chosen& from = chosen_[(size_t)anchor];
  const int64_t anchor_heads = layers_[(size_t)anchor].kv_heads;
  require(from.step == step_ && (int64_t)from.grid.size() == batch_ * anchor_heads * n,
          "the layer whose blocks are read has chosen none in this step.");
  uint8_t* out = to.data();
  for (int64_t b = 0; b < batch_; ++b)
    for (int64_t head : heads) {
      const uint8_t* row = from.grid.data() + (b * anchor_heads + head) * n;
      out = std::copy(row, row + n, out);
    }
}

}  // namespace saccade
