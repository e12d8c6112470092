// The tensors of a case as a call of the kernels, and the same keys as rows of doubles.
#pragma once
#include <limits>

#include "cases.h"
#include "storage.h"

namespace contract {

constexpr int64_t kPage = 16, kGroup = 32, kBlock = 32;

// A key and value of one (row of the batch, KV head) as the storage means them.
struct Key {
  int64_t position;
  std::vector<double> k, v;
};

struct Inputs {
  const Case& c;
  saccade::CallArg call;
  std::vector<std::vector<Key>> keys;  // [batch * kv_heads]
  Array q, k, v, out, lse, table, lengths, sink_logits, alibi, padding, blocks;
  Array qdata[2], scale[2], offset[2];  // of keys and of values

  explicit Inputs(const Case& c) : c(c), keys(c.batch * c.kv_heads) {
    q = random(c.dtype, {c.batch, c.heads, c.q_len, c.dim});
    out = Array(c.dtype, {c.batch, c.heads, c.q_len, c.value_dim});
    lse = Array(Dtype::f32, {c.batch, c.heads, c.q_len});
    call.q = q.arg();
    call.out = out.arg();
    call.lse = lse.arg();
    call.causal = c.causal;
    call.window = c.window;
    call.sinks = c.sinks;
    call.softcap = c.softcap;
    call.scale = scale_of_scores();
    call.q_offset = c.kv_len - c.q_len;
    call.threads = c.threads;
    if (c.kind == ViewKind::quantized) {
      make_quantized();
    } else if (c.kind == ViewKind::paged) {
      make_pages();
    } else {
      make_dense();
    }
    make_extras();
  }

  double scale_of_scores() const { return 1 / std::sqrt((double)c.dim); }
  std::vector<Key>& keys_of(int64_t b, int64_t head) { return keys[b * c.kv_heads + head]; }

 private:
  static std::vector<double> row(const Array& x, int64_t index) {
    const int64_t width = x.shape.back();
    std::vector<double> found(width);
    for (int64_t d = 0; d < width; ++d) found[d] = x.get(index * width + d);
    return found;
  }

  // A ring holds its newest 50 keys in front of the older ones.
  void make_dense() {
    k = random(c.dtype, {c.batch, c.kv_heads, c.kv_len, c.dim});
    v = random(c.dtype, {c.batch, c.kv_heads, c.kv_len, c.value_dim});
    const int64_t newest = c.ring ? 50 : 0;
    if (c.ring)
      call.kv.spans = {{newest, 0, c.kv_len - newest}, {0, c.kv_len - newest, newest}};
    for (int64_t h = 0; h < c.batch * c.kv_heads; ++h)
      for (int64_t at = 0; at < c.kv_len; ++at) {
        const int64_t slot = h * c.kv_len + (at + newest) % c.kv_len;
        keys[h].push_back({at, row(k, slot), row(v, slot)});
      }
    call.kv.k = k.arg();
    call.kv.v = v.arg();
  }

  // Pages in reverse order in a pool whose unused places hold NaN; row b has 5 b keys fewer.
  void make_pages() {
    const int64_t used = (c.kv_len + kPage - 1) / kPage, pages = c.batch * used + 1;
    call.kv.kind = ViewKind::paged;
    k = Array(c.dtype, {pages, c.kv_heads, kPage, c.dim});
    v = Array(c.dtype, {pages, c.kv_heads, kPage, c.value_dim});
    for (Array* x : {&k, &v})
      for (int64_t i = 0; i < x->size(); ++i) x->set(i, std::numeric_limits<double>::quiet_NaN());
    table = Array(Dtype::i32, {c.batch, used});
    lengths = Array(Dtype::i32, {c.batch});
    for (int64_t b = 0; b < c.batch; ++b) {
      lengths.set(b, (double)(c.kv_len - 5 * b));
      for (int64_t i = 0; i < used; ++i)
        table.set(b * used + i, (double)(pages - 1 - b * used - i));
      for (int64_t h = 0; h < c.kv_heads; ++h)
        for (int64_t at = 0; at < c.kv_len - 5 * b; ++at) {
          const int64_t page = pages - 1 - b * used - at / kPage;
          const int64_t slot = (page * c.kv_heads + h) * kPage + at % kPage;
          for (int64_t d = 0; d < c.dim; ++d) k.set(slot * c.dim + d, normal());
          for (int64_t d = 0; d < c.value_dim; ++d) v.set(slot * c.value_dim + d, normal());
          keys_of(b, h).push_back({at, row(k, slot), row(v, slot)});
        }
    }
    call.kv.k = k.arg();
    call.kv.v = v.arg();
    call.kv.table = table.arg();
    call.kv.lengths = lengths.arg();
  }

  // x = qdata * scale + offset: scales of a key channel for kGroup tokens, of a token for kGroup
  // channels of its value.  4-bit channel c is the low half of byte c, c + dim / 2 the high one.
  void make_quantized() {
    const int64_t heads = c.batch * c.kv_heads, n = (c.kv_len - c.recent) / kGroup * kGroup;
    const int64_t recent = c.kv_len - n;
    call.kv.kind = ViewKind::quantized;
    k = random(c.dtype, {c.batch, c.kv_heads, recent, c.dim});
    v = random(c.dtype, {c.batch, c.kv_heads, recent, c.value_dim});
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t at = 0; at < n; ++at)
        keys[h].push_back({at, std::vector<double>(c.dim), std::vector<double>(c.value_dim)});
    for (int of = 0; of < 2; ++of) fill_quantized(of, n);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t at = n; at < c.kv_len; ++at)
        keys[h].push_back({at, row(k, h * recent + at - n), row(v, h * recent + at - n)});
    call.kv.k = k.arg();
    call.kv.v = v.arg();
    call.kv.k_qdata = qdata[0].arg();
    call.kv.k_scale = scale[0].arg();
    call.kv.k_offset = offset[0].arg();
    call.kv.v_qdata = qdata[1].arg();
    call.kv.v_scale = scale[1].arg();
    call.kv.v_offset = offset[1].arg();
    call.kv.bits_k = c.bits_k;
    call.kv.bits_v = c.bits_v;
    call.kv.k_group = kGroup;
  }

  void fill_quantized(int of, int64_t n) {
    const int bits = of ? c.bits_v : c.bits_k;
    const int64_t dim = of ? c.value_dim : c.dim, width = dim * bits / 8;
    const int64_t rows = of ? n : n / kGroup, columns = of ? dim / kGroup : dim;
    qdata[of] = Array(Dtype::u8, {c.batch, c.kv_heads, n, width});
    scale[of] = Array(Dtype::f16, {c.batch, c.kv_heads, rows, columns});
    offset[of] = scale[of];
    for (int64_t i = 0; i < scale[of].size(); ++i) {
      scale[of].set(i, (2 + 0.3 * normal()) / ((1 << bits) - 1));
      offset[of].set(i, 0.3 * normal() - 1);
    }
    for (int64_t i = 0; i < qdata[of].size(); ++i) qdata[of].set(i, (double)(source() >> 56));
    for (int64_t h = 0; h < c.batch * c.kv_heads; ++h)
      for (int64_t at = 0; at < n; ++at)
        for (int64_t d = 0; d < dim; ++d) {
          const int64_t scales = of ? (h * rows + at) * columns + d / kGroup
                                    : (h * rows + at / kGroup) * columns + d;
          int number = (int)qdata[of].get((h * n + at) * width + d % width);
          if (bits == 4) number = d < width ? number & 15 : number >> 4;
          const double x = number * scale[of].get(scales) + offset[of].get(scales);
          (of ? keys[h][at].v : keys[h][at].k)[d] = x;
        }
  }

  void make_extras() {
    if (c.sink_logits) {
      sink_logits = random(Dtype::f32, {c.heads});
      call.sink_logits = sink_logits.arg();
    }
    if (c.alibi) {
      alibi = Array(Dtype::f32, {1, c.heads});
      for (int64_t h = 0; h < c.heads; ++h) alibi.set(h, 0.02 * (double)(h + 1));
      call.alibi = alibi.arg();
    }
    if (c.padding) {
      padding = Array(Dtype::boolean, {c.batch, c.kv_len});
      for (int64_t i = 0; i < padding.size(); ++i) padding.set(i, source() % 4 != 0);
      call.key_padding = padding.arg();
    }
    if (c.blocks) {
      const int64_t rows = (c.q_len + kBlock - 1) / kBlock;
      blocks = Array(Dtype::boolean,
                     {c.batch, c.kv_heads, rows, (c.kv_len + kBlock - 1) / kBlock});
      for (int64_t i = 0; i < blocks.size(); ++i) blocks.set(i, source() % 2);
      call.blocks = blocks.arg();
      call.q_block = call.k_block = kBlock;
    }
  }
};

}  // namespace contract
