#include "decoder.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>

#include "check_tensor.h"
#include "checks.h"
#include "layer.h"
#include "layer_arguments.h"
#include "selection_arguments.h"

namespace saccade {
namespace {

void check_rows_of(const TensorArg& x, const char* name, std::initializer_list<int64_t> shape) {
  check_tensor(x, name, (int)shape.size());
  check_shape(x, name, shape);
  require(is_float(x.dtype), "expected float32, bfloat16 or float16.");
  int64_t expected = 1;
  for (int i = x.ndim - 1; i >= 0; --i) {
    require(x.shape[i] == 1 || x.stride[i] == expected, "expected contiguous memory.");
    expected *= x.shape[i];
  }
}

// The quantized part of a view of all storage, as far as it holds tokens.
void cut_quantized(ViewArg& kv, int64_t tokens) {
  const int64_t all = kv.v_qdata->shape[2];
  require(kv.k_qdata->ndim == 4 && kv.v_qdata->ndim == 4 && kv.k_group >= 1 && tokens >= 0 &&
              tokens <= all && tokens % kv.k_group == 0,
          "there are not so many quantized tokens.");
  for (auto* part : {&kv.k_qdata, &kv.v_qdata, &kv.v_scale, &kv.v_offset})
    (*part)->shape[2] = tokens;
  kv.k_scale->shape[2] = kv.k_offset->shape[2] = tokens / kv.k_group;
}

}  // namespace

Decoder::Decoder(int64_t hidden, nb::list layers, nb::handle norm, nb::handle head,
                 int64_t vocab, const std::string& target)
    : kernels_(find_kernels(target.c_str())), hidden_(hidden) {
  if (!kernels_) fail("this machine has no SIMD target \"" + target + "\".");
  require(hidden >= 1 && hidden <= kMaxCount, "hidden is out of range.");
  for (nb::handle each : layers) {
    const ReadLayer read = read_layer(each, hidden);
    layers_.push_back(read.layer);
    attends_.push_back({read.scale, read.softcap});
  }
  stored_.resize(layers_.size());
  chosen_.resize(layers_.size());
  norm_ = read_norm(norm, hidden, "norm");
  if (!head.is_none()) head_ = read_weight(head, vocab, hidden, "head");
}

const Layer& Decoder::layer(int64_t i) const {
  require(i >= 0 && i < (int64_t)layers_.size(), "there is no such layer.");
  return layers_[(size_t)i];
}

void Decoder::check_begun() const { require(batch_ > 0, "no step has begun."); }

void Decoder::begin(nb::handle x, int64_t threads) {
  const TensorArg from = tensor(x);
  require(from.ndim == 3, "x must be [batch, tokens, hidden].");
  check_rows_of(from, "x", {from.shape[0], from.shape[1], hidden_});
  const int64_t rows = from.shape[0] * from.shape[1];
  require(rows >= 1 && rows <= kMaxRows, "a step takes 1 to 9 rows.");
  require(threads >= 1 && threads <= 4096, "threads must be 1 to 4096.");
  batch_ = from.shape[0];
  tokens_ = from.shape[1];
  threads_ = (int)threads;
  ++step_;
  int64_t q = 0, scratch = 0;
  for (const Layer& each : layers_) {
    q = std::max(q, each.heads * each.head_dim);
    scratch = std::max({scratch, hidden_ + 2 * each.kv_heads * each.head_dim,
                        hidden_ + 2 * each.inner});
  }
  x_.resize((size_t)(rows * hidden_));
  q_.resize((size_t)(rows * q));
  attended_.resize((size_t)(rows * q));
  scratch_.resize((size_t)(rows * scratch));
  kernels_->step->widen({from.data, from.dtype}, rows * hidden_, x_.data());
}

void Decoder::check_tables(const Layer& layer, const TensorArg& cos, const TensorArg& sin) const {
  for (const TensorArg* table : {&cos, &sin}) {
    check_tensor(*table, "cos and sin", 2);
    const int64_t rotated = cos.shape[1];
    require(rotated <= layer.head_dim && rotated % 2 == 0, "more than a head would be rotated.");
    check_rows_of(*table, "cos and sin", {tokens_, rotated});
    check_dtype(*table, "cos and sin", Dtype::f32);
  }
}

// Where the new tokens of a layer go in x [batch, kv_heads, slots, head_dim], from a slot on.
Strided Decoder::slots(const TensorArg& x, const Layer& layer, int64_t slot,
                       const char* name) const {
  check_tensor(x, name, 4);
  check_shape(x, name, {batch_, layer.kv_heads, x.shape[2], layer.head_dim});
  require(is_float(x.dtype), "keys are stored as float32, bfloat16 or float16.");
  require(slot >= 0 && slot <= x.shape[2] - tokens_, "there is no room for the new tokens.");
  check_no_self_overlap(x, name);
  Strided to = strided(x);
  to.data += slot * to.row;
  return to;
}

bool Decoder::front_checked(const Layer& layer, const LayerCall& call) {
  const auto *cos = (const float*)call.kind->cos.data, *sin = (const float*)call.kind->sin.data;
  return kernels_->step->front(layer, {x_.data(), batch_, tokens_, cos, sin,
                                       call.kind->cos.shape[1], q_.data(), call.k, call.v,
                                       call.storing, scratch_.data(), threads_});
}

void Decoder::front(int64_t i, nb::handle cos, nb::handle sin, nb::handle k, nb::handle v) {
  check_begun();
  const Layer& at = layer(i);
  const Kind kind{tensor(cos), tensor(sin), -1, 0};
  check_tables(at, kind.cos, kind.sin);
  const LayerCall call{&kind, {}, slots(tensor(k), at, 0, "k"), slots(tensor(v), at, 0, "v"), {}, {}, {}, 0};
  nb::gil_scoped_release unlocked;
  std::lock_guard<std::mutex> lock(busy_);
  front_checked(at, call);
}

void Decoder::queries(nb::handle q) {
  check_begun();
  const TensorArg to = tensor(q);
  check_tensor(to, "q", 4);
  require(to.shape[0] == batch_ && to.shape[2] == tokens_ && is_float(to.dtype) &&
              to.shape[0] * to.shape[1] * to.shape[2] * to.shape[3] <= (int64_t)q_.size(),
          "q has another shape than the queries of this step.");
  check_no_self_overlap(to, "q");
  const Strided place = strided(to);
  const int64_t heads = to.shape[1], dim = to.shape[3];
  for (int64_t b = 0; b < batch_; ++b)
    for (int64_t t = 0; t < tokens_; ++t)
      for (int64_t h = 0; h < heads; ++h)
        kernels_->step->narrow(
            q_.data() + ((b * tokens_ + t) * heads + h) * dim, dim,
            {place.data + b * place.batch + h * place.head + t * place.row, place.dtype});
}

void Decoder::attend_checked(int64_t i, CallArg& call, std::vector<float>& out, float* lse) {
  const Layer& at = layers_[(size_t)i];
  call.q = by_heads(q_, batch_, at.heads, tokens_, at.head_dim);
  call.out = by_heads(out, batch_, at.heads, tokens_, at.head_dim);
  if (lse) {
    const int64_t head = tokens_, row = at.heads * tokens_;
    call.lse = TensorArg{(char*)lse, Dtype::f32, 3, {batch_, at.heads, tokens_}, {row, head, 1},
                         batch_ * row * (int64_t)sizeof(float)};
  }
  call.scale = attends_[(size_t)i].scale;
  call.softcap = attends_[(size_t)i].softcap;
  call.threads = threads_;
  CheckedProblem checked;
  check(call, checked);
  kernels_->attend(checked.problem);
}

// Attention over the view of a layer and over sinks before it, weighted by their sums.
void Decoder::attend_sinks(int64_t i, LayerCall& call) {
  const Layer& at = layers_[(size_t)i];
  sinks_.resize(attended_.size());
  lse_.resize((size_t)(2 * rows() * at.heads));
  float *view_lse = lse_.data(), *sink_lse = view_lse + rows() * at.heads;
  attend_checked(i, call.attention, attended_, view_lse);
  attend_checked(i, *call.sinks, sinks_, sink_lse);
  for (int64_t r = 0; r < rows(); ++r)
    for (int64_t h = 0; h < at.heads; ++h) {
      const int64_t n = (r / tokens_ * at.heads + h) * tokens_ + r % tokens_;
      const float share = 1.f / (1.f + std::exp(view_lse[n] - sink_lse[n]));  // of the sinks
      float* out = attended_.data() + (r * at.heads + h) * at.head_dim;
      const float* more = sinks_.data() + (r * at.heads + h) * at.head_dim;
      for (int64_t d = 0; d < at.head_dim; ++d) out[d] += share * (more[d] - out[d]);
    }
}

void Decoder::back_checked(const Layer& layer) {
  kernels_->step->back(layer, {x_.data(), attended_.data(), rows(), scratch_.data(), threads_});
}

void Decoder::attend(int64_t i, nb::tuple kv, int64_t window, int64_t sinks, int64_t q_offset) {
  check_begun();
  const Layer& at = layer(i);
  CallArg call;
  call.kv = read_view(kv);
  call.window = window;
  call.sinks = sinks;
  call.q_offset = q_offset;
  nb::gil_scoped_release unlocked;
  std::lock_guard<std::mutex> lock(busy_);
  attend_checked(i, call, attended_);
  back_checked(at);
}

void Decoder::back(int64_t i, nb::handle attended) {
  check_begun();
  const Layer& at = layer(i);
  const TensorArg from = tensor(attended);
  check_rows_of(from, "attended", {batch_, tokens_, at.heads * at.head_dim});
  nb::gil_scoped_release unlocked;
  std::lock_guard<std::mutex> lock(busy_);
  kernels_->step->widen({from.data, from.dtype}, rows() * at.heads * at.head_dim, attended_.data());
  back_checked(at);
}

void Decoder::stored(int64_t i, nb::tuple view, bool hadamard, nb::handle sinks,
                     nb::handle selection) {
  layer(i);
  Stored found{read_view(view), std::nullopt, {hadamard}, true, std::nullopt, std::nullopt};
  if (!selection.is_none()) {
    require(sinks.is_none() && found.view.kind != ViewKind::ragged,
            "blocks are selected neither beside sinks nor of ragged views.");
    read_selection(i, nb::cast<nb::tuple>(selection), found);
  }
  if (!sinks.is_none()) found.sinks = read_view(nb::cast<nb::tuple>(sinks));
  const ViewKind kind = found.view.kind;
  require(kind != ViewKind::paged, "steps write to dense, quantized and ragged views alone.");
  found.storing.bounded = kind == ViewKind::quantized && found.view.k.dtype == Dtype::f16;
  stored_[(size_t)i] = std::move(found);
}

// Layer i with the new tokens at `place`, as far as it does not depend on the layers before.
Decoder::LayerCall Decoder::layer_call(int64_t i, const Kind& kind, nb::handle place) {
  const Layer& at = layer(i);
  const Stored& stored = stored_[(size_t)i];
  require(stored.known, "where a layer stores its keys was not said.");
  check_tables(at, kind.cos, kind.sin);
  LayerCall call{&kind, {}, {}, {}, stored.storing, std::nullopt, std::nullopt, 0};
  CallArg& attention = call.attention;
  ViewArg& kv = attention.kv = stored.view;
  const nb::tuple fields = nb::cast<nb::tuple>(place);
  require(fields.size() == 4, "a place is (slot, position, spans, blocks).");
  attention.window = kind.window;
  attention.sinks = kind.sinks;
  attention.hadamard = stored.storing.hadamard;
  if (kv.kind == ViewKind::ragged) {
    require(!stored.sinks && !attention.hadamard, "ragged views are stored as they are.");
    place_ragged(at, integer(fields[1]), call);
    return call;
  }
  const int64_t slot = integer(fields[0]), before = integer(fields[1]) - slot;
  call.k = slots(kv.k, at, slot, "k");
  call.v = slots(kv.v, at, slot, "v");
  kv.spans = read_spans(fields[2]);
  require(kv.spans.empty() || kv.kind == ViewKind::dense, "quantized views take no spans.");
  if (kv.spans.empty()) {
    kv.k.shape[2] = kv.v.shape[2] = slot + tokens_;
    if (kv.kind == ViewKind::quantized)
      cut_quantized(kv, before);
    else
      require(before == 0, "slots in order of positions begin at position 0.");
  }
  attention.q_offset = before + slot;
  call.blocks = integer(fields[3]);
  if (!stored.sinks) return call;
  attention.sinks = 0;
  call.sinks.emplace();
  call.sinks->kv = *stored.sinks;
  call.sinks->causal = false;
  return call;
}

// New keys and values of a ragged view wait in a buffer, [batch, kv_heads, tokens, head_dim] each.
void Decoder::place_ragged(const Layer& layer, int64_t position, LayerCall& call) {
  require(position >= 0 && position <= kMaxPosition - tokens_, "the position is out of range.");
  call.ragged = find_places(call.attention.kv, batch_, layer.kv_heads, tokens_, layer.head_dim);
  call.attention.q_offset = position;
  const int64_t row = layer.head_dim * (int64_t)sizeof(float), all = rows() * layer.kv_heads * row;
  new_kv_.resize(std::max(new_kv_.size(), (size_t)(2 * all) / sizeof(float)));
  call.k = {nullptr, Dtype::f32, tokens_ * layer.kv_heads * row, tokens_ * row, row};
  call.v = call.k;
}

int64_t Decoder::run(int64_t first, nb::list places, nb::list kinds, nb::list of_kind) {
  check_begun();
  std::vector<Kind> read;
  for (nb::handle each : kinds) {
    nb::tuple kind = nb::cast<nb::tuple>(each);
    require(kind.size() == 4, "a kind is (cos, sin, window, sinks).");
    read.push_back({tensor(kind[0]), tensor(kind[1]), nb::cast<int64_t>(kind[2]),
                    nb::cast<int64_t>(kind[3])});
  }
  const int64_t n = (int64_t)places.size(), all = (int64_t)layers_.size();
  require(first >= 0 && first <= all && n <= all - first && (int64_t)of_kind.size() == all,
          "expected a place for layers that there are, and a kind of each layer.");
  std::vector<LayerCall> calls;
  for (int64_t i = 0; i < n; ++i) {
    const size_t kind = nb::cast<size_t>(of_kind[(size_t)(first + i)]);
    require(kind < read.size(), "there is no such kind.");
    calls.push_back(layer_call(first + i, read[kind], places[(size_t)i]));
  }
  nb::gil_scoped_release unlocked;
  std::lock_guard<std::mutex> lock(busy_);
  for (int64_t i = 0; i < n; ++i) {
    LayerCall& call = calls[(size_t)i];
    const Layer& at = layers_[(size_t)(first + i)];
    float* const k = new_kv_.data();
    float* const v = k + rows() * at.kv_heads * at.head_dim;
    if (call.ragged) {
      call.k.data = (char*)k;
      call.v.data = (char*)v;
      call.attention.kv.lengths = lengths_of(*call.ragged, batch_, at.kv_heads);
    }
    if (!front_checked(at, call)) return i;
    if (call.ragged)
      write_places(call.attention.kv, *call.ragged, *kernels_->step, k, v, tokens_,
                   call.attention.q_offset);
    if (stored_[(size_t)(first + i)].rule) select(first + i, call);
    if (call.sinks)
      attend_sinks(first + i, call);
    else
      attend_checked(first + i, call.attention, attended_);
    back_checked(at);
  }
  return n;
}

void Decoder::finish(nb::handle out) {
  check_begun();
  const TensorArg to = tensor(out);
  check_rows_of(to, "out", {batch_, tokens_, hidden_});
  for (int64_t r = 0; r < rows(); ++r)
    kernels_->step->normalize(norm_, x_.data() + r * hidden_, hidden_, x_.data() + r * hidden_);
  kernels_->step->narrow(x_.data(), rows() * hidden_, {to.data, to.dtype});
  batch_ = 0;
}

void Decoder::logits(nb::handle hidden, nb::handle out, int64_t threads) {
  require(head_.out > 0, "this decoder has no output matrix.");
  const TensorArg from = tensor(hidden), to = tensor(out);
  require(from.ndim == 2 && threads >= 1 && threads <= 4096, "hidden must be [rows, hidden].");
  const int64_t rows = from.shape[0];
  require(rows >= 1 && rows <= kMaxRows, "a step takes 1 to 9 rows.");
  check_rows_of(from, "hidden", {rows, hidden_});
  check_rows_of(to, "logits", {rows, head_.out});
  check_dtype(to, "logits", Dtype::f32);
  nb::gil_scoped_release unlocked;
  std::lock_guard<std::mutex> lock(busy_);
  x_.resize(std::max(x_.size(), (size_t)(rows * hidden_)));
  batch_ = 0;
  kernels_->step->widen({from.data, from.dtype}, rows * hidden_, x_.data());
  kernels_->step->multiply(head_, x_.data(), rows, (float*)to.data, (int)threads);
}

void define_decoder(nb::module_& m) {
  nb::class_<Decoder>(m, "Decoder")
      .def(nb::init<int64_t, nb::list, nb::handle, nb::handle, int64_t, const std::string&>(),
           nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg())
      .def("begin", &Decoder::begin)
      .def("front", &Decoder::front)
      .def("queries", &Decoder::queries)
      .def("attend", &Decoder::attend)
      .def("back", &Decoder::back)
      .def("stored", &Decoder::stored, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
           nb::arg().none())
      .def("run", &Decoder::run)
      .def("finish", &Decoder::finish)
      .def("logits", &Decoder::logits);
}

}  // namespace saccade
