// The layers of one decoder, and what a step through them holds between two calls from Python.
#pragma once
#include <nanobind/nanobind.h>

#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "dispatch.h"
#include "layer.h"
#include "ragged_places.h"
#include "selection.h"

namespace saccade {

// How a layer attends in every call.
struct Attends {
  double scale = 1, softcap = 0;
};

class Decoder {
 public:
  // `layers`: see read_layer; `norm`: (weight, eps, plus_one) behind the last one; `head`: the
  // output matrix [vocab, hidden] or None.  Tensors have to stay alive as long as the decoder.
  Decoder(int64_t hidden, nb::list layers, nb::handle norm, nb::handle head,
          int64_t vocab, const std::string& target);

  // Begins a step: x [batch, tokens, hidden].  cos and sin of a kind of layer are float32
  // [tokens, rotated], the first channels of a head, or all.
  void begin(nb::handle x, int64_t threads);

  // Stores k and v [batch, kv_heads, tokens, head_dim] of layer i; queries stay inside.
  void front(int64_t i, nb::handle cos, nb::handle sin, nb::handle k, nb::handle v);

  // The queries of the last `front`, as [batch, heads, tokens, head_dim].
  void queries(nb::handle q);

  // The rest of layer i behind attention over a view; as `attend` of the module.
  void attend(int64_t i, nb::tuple kv, int64_t window, int64_t sinks, int64_t q_offset);

  // The rest of layer i behind `attended` [batch, tokens, heads * head_dim].
  void back(int64_t i, nb::handle attended);

  // Where layer i stores its keys and values, until that is said anew: a dense, quantized or ragged
  // view of all slots, filled or not, as for `attend`; `hadamard`: they are stored transformed.
  // `sinks`: a dense view of keys before it that all new queries see, not transformed, or None.
  // `selection`: (rule, summaries or None, reuse) of the blocks of keys that are read, or None for
  // all keys; see selection_arguments.h.  `reuse`: None, or (anchor, heads): the blocks that the
  // layer `anchor` chose in this step, for each KV head those of one of its.
  void stored(int64_t i, nb::tuple view, bool hadamard, nb::handle sinks, nb::handle selection);

  // The layers from `first` on, one for each of `places`: (slot, position, spans, blocks) of the
  // new tokens in the view of their layer (cache/placing.py); blocks: how many have a summary.  `kinds` are (cos, sin, window, sinks);
  // of_kind[i] says which kind layer i is.  Returns how many layers were computed: the next one
  // has keys or values that its quantized storage does not hold, and nothing of it was done.
  int64_t run(int64_t first, nb::list places, nb::list kinds, nb::list of_kind);

  // Ends a step: the normed rows of x -> out [batch, tokens, hidden].
  void finish(nb::handle out);

  // logits [rows, vocab] float32 of normed hidden states [rows, hidden].
  void logits(nb::handle hidden, nb::handle out, int64_t threads);

 private:
  struct Kind {
    TensorArg cos, sin;
    int64_t window, sinks;
  };
  struct Stored {
    ViewArg view;
    std::optional<ViewArg> sinks;
    Storing storing;
    bool known = false;
    std::optional<BlockRule> rule;
    std::optional<TensorArg> summaries;
    std::optional<int64_t> anchor;  // the layer whose blocks are read, by KV head `heads`
    std::vector<int64_t> heads;
  };
  struct Chosen {
    std::vector<uint8_t> grid;  // [batch, kv_heads, 1, blocks]
    int64_t step = -1;  // in which it was chosen
  };
  struct LayerCall {
    const Kind* kind;
    CallArg attention;
    Strided k, v;  // where the new tokens go
    Storing storing;
    std::optional<CallArg> sinks;
    std::optional<RaggedPlaces> ragged;
    int64_t blocks;  // that have a summary, where blocks are selected
  };

  const Layer& layer(int64_t i) const;
  int64_t rows() const { return batch_ * tokens_; }
  void check_begun() const;
  void check_tables(const Layer& layer, const TensorArg& cos, const TensorArg& sin) const;
  Strided slots(const TensorArg& x, const Layer& layer, int64_t slot, const char* name) const;
  LayerCall layer_call(int64_t i, const Kind& kind, nb::handle place);
  void place_ragged(const Layer& layer, int64_t position, LayerCall& call);
  bool front_checked(const Layer& layer, const LayerCall& call);
  void read_selection(int64_t i, nb::tuple fields, Stored& found) const;
  void select(int64_t i, LayerCall& call);
  void copy_chosen(int64_t anchor, const std::vector<int64_t>& heads, int64_t n,
                   std::vector<uint8_t>& to) const;
  void attend_checked(int64_t i, CallArg& call, std::vector<float>& out, float* lse = nullptr);
  void attend_sinks(int64_t i, LayerCall& call);
  void back_checked(const Layer& layer);

  const Kernels* kernels_;
  int64_t hidden_;
  std::vector<Layer> layers_;
  std::vector<Attends> attends_;
  std::vector<Stored> stored_;
  Norm norm_;
  Weight head_;
  int64_t batch_ = 0, tokens_ = 0;
  int threads_ = 1;
  std::vector<float> x_, q_, attended_, scratch_, sinks_, lse_, new_kv_;
  std::vector<Chosen> chosen_;  // the blocks that each layer read last
  int64_t step_ = 0;
  std::mutex busy_;
};

// float32 memory of ours as a tensor [batch, heads, tokens, dim], rows [batch, tokens, heads, dim].
TensorArg by_heads(std::vector<float>& x, int64_t batch, int64_t heads, int64_t tokens,
                   int64_t dim);

void define_decoder(nb::module_& m);

}  // namespace saccade
