// The four kinds of key/value views.
#include <algorithm>

#include "checker.h"

namespace saccade {
namespace {

// Pages [pages, page_size, dim] without a dimension of heads.
Strided strided_pages(const TensorArg& x) {
  const int64_t size = item_size(x.dtype);
  return {x.data, x.dtype, x.stride[0] * size, 0, x.stride[1] * size};
}

}  // namespace

void Checker::check_view() {
  p_.kv.kind = c_.kv.kind;
  switch (c_.kv.kind) {
    case ViewKind::dense: check_dense(); break;
    case ViewKind::paged: check_paged(); break;
    case ViewKind::ragged: check_ragged(); break;
    case ViewKind::quantized: check_quantized(); break;
  }
  require(p_.value_dim >= 1 && p_.value_dim <= kMaxDim, "value_dim must be 1 to 576.");
  require(p_.kv_heads >= 1 && p_.heads >= 1 && p_.heads % p_.kv_heads == 0,
          "the query heads must be a multiple of the key/value heads.");
  require(end_ <= kMaxPosition, "the keys reach beyond the largest supported position.");
  p_.group = p_.heads / p_.kv_heads;
}

void Checker::check_kv_tensors(int ndim) {
  const TensorArg &k = c_.kv.k, &v = c_.kv.v;
  check_tensor(k, "k", ndim);
  check_tensor(v, "v", ndim);
  require(is_float(k.dtype) && is_float(v.dtype), "k and v must be float32, bfloat16 or float16.");
  for (int i = 0; i + 1 < ndim; ++i)
    require(k.shape[i] == v.shape[i], "k and v must agree in all dimensions but the last.");
  require(k.shape[ndim - 1] == p_.head_dim, "q and k must share head_dim.");
  p_.value_dim = v.shape[ndim - 1];
  p_.kv.k = strided(k);
  p_.kv.v = strided(v);
}

void Checker::check_dense() {
  check_kv_tensors(4);
  const TensorArg& k = c_.kv.k;
  require(k.shape[0] == batch_, "q and k must share the batch.");
  p_.kv_heads = k.shape[1];
  r_.spans = c_.kv.spans;
  if (r_.spans.empty()) r_.spans.push_back({0, 0, k.shape[2]});
  end_ = 0;
  for (const Span& s : r_.spans) {
    require(s.length >= 0 && s.slot >= 0 && s.slot <= k.shape[2] &&
                s.length <= k.shape[2] - s.slot,
            "a span lies outside of the slots.");
    require(s.position >= end_ && s.position <= kMaxPosition,
            "spans must ascend in position without overlap.");
    end_ = s.position + s.length;
  }
}

// Every table entry below the length of its row must be the number of a page.
void Checker::check_table_row(const int32_t* row, int64_t max_pages, int64_t length) {
  const int64_t size = p_.kv.page_size, pages = c_.kv.k.shape[0];
  if (length < 0 || length > max_pages * size)
    fail("a length of " + number(length) + " does not fit into " + number(max_pages) +
         " pages of " + number(size) + ".");
  for (int64_t i = 0; i * size < length; ++i)
    if (row[i] < 0 || row[i] >= pages)
      fail("table entry " + number(row[i]) + " is not one of the " + number(pages) + " pages.");
}

// Page table [batch, ...] and lengths, both int32; their last dimensions differ.
void Checker::check_table(int table_dims) {
  const TensorArg &table = *c_.kv.table, &lengths = *c_.kv.lengths;
  require(p_.kv.page_size >= 1, "page_size must be at least 1.");
  check_tensor(table, "table", table_dims);
  check_dtype(table, "table", Dtype::i32);
  require(table.shape[0] == batch_, "the table must have one row for each row of q.");
  check_tensor(lengths, "lengths of the view", table_dims - 1, false);
  check_dtype(lengths, "lengths of the view", Dtype::i32);
  p_.kv.table = (const int32_t*)table.data;
  p_.kv.table_batch = table.stride[0];
}

void Checker::check_paged() {
  check_kv_tensors(4);
  p_.kv_heads = c_.kv.k.shape[1];
  p_.kv.page_size = c_.kv.k.shape[2];
  require(c_.kv.table && c_.kv.lengths, "a paged view needs a table and lengths.");
  check_table(2);
  const TensorArg &table = *c_.kv.table, &lengths = *c_.kv.lengths;
  check_shape(lengths, "lengths of the view", {batch_});
  end_ = 0;
  for (int64_t b = 0; b < batch_; ++b) {
    const int64_t length = integer_at(lengths, b);
    check_table_row(p_.kv.table + b * table.stride[0], table.shape[1], length);
    end_ = std::max(end_, length);
  }
}

void Checker::check_ragged() {
  check_kv_tensors(3);
  p_.kv.page_size = c_.kv.k.shape[1];
  require(c_.kv.table && c_.kv.lengths && c_.kv.positions,
          "a ragged view needs a table, lengths and positions.");
  check_table(3);
  p_.kv_heads = c_.kv.table->shape[1];
  p_.kv.table_head = c_.kv.table->stride[1];
  p_.kv.k = strided_pages(c_.kv.k);
  p_.kv.v = strided_pages(c_.kv.v);
  check_ragged_positions();
  check_ragged_lengths();
  end_ = kMaxPosition;  // positions are compared, never used as an index
  require(!c_.key_padding && !c_.blocks && !c_.attn_mask,
          "a ragged view takes no key_padding, blocks or attn_mask.");
}

void Checker::check_ragged_positions() {
  const TensorArg& positions = *c_.kv.positions;
  check_tensor(positions, "positions", 2);
  check_dtype(positions, "positions", Dtype::i32);
  check_shape(positions, "positions", {c_.kv.k.shape[0], c_.kv.k.shape[1]});
  p_.kv.positions = (const int32_t*)positions.data;
  p_.kv.positions_page = positions.stride[0];
}

void Checker::check_ragged_lengths() {
  const TensorArg &table = *c_.kv.table, &lengths = *c_.kv.lengths;
  check_shape(lengths, "lengths of the view", {batch_, p_.kv_heads});
  p_.kv.lengths = (const int32_t*)lengths.data;
  p_.kv.lengths_batch = lengths.stride[0];
  p_.kv.lengths_head = lengths.stride[1];
  for (int64_t b = 0; b < batch_; ++b)
    for (int64_t h = 0; h < p_.kv_heads; ++h)
      check_table_row(p_.kv.table + b * table.stride[0] + h * table.stride[1], table.shape[2],
                      p_.kv.lengths[b * lengths.stride[0] + h * lengths.stride[1]]);
}

void Checker::check_quantized() {
  check_kv_tensors(4);
  const ViewArg& kv = c_.kv;
  require(kv.k.shape[0] == batch_, "q and k must share the batch.");
  p_.kv_heads = kv.k.shape[1];
  require(kv.k_qdata && kv.k_scale && kv.k_offset && kv.v_qdata && kv.v_scale && kv.v_offset,
          "a quantized view needs qdata, scale and offset of keys and values.");
  check_tensor(*kv.k_qdata, "qdata", 4);
  const int64_t tokens = kv.k_qdata->shape[2], group = kv.k_group;
  require(group >= 1 && tokens % group == 0, "quantized keys must fill full groups.");
  require(kv.v_scale->ndim == 4, "scales must have 4 dimensions.");
  const int64_t channels = kv.v_scale->shape[3];
  require(channels >= 1 && p_.value_dim % channels == 0,
          "the channels of a value must fill full groups.");
  p_.kv.num_quantized = tokens;
  p_.kv.quantized_k = quantized_tensor(*kv.k_qdata, *kv.k_scale, *kv.k_offset, kv.bits_k,
                                       p_.head_dim, tokens / group, p_.head_dim);
  p_.kv.quantized_v = quantized_tensor(*kv.v_qdata, *kv.v_scale, *kv.v_offset, kv.bits_v,
                                       p_.value_dim, tokens, channels);
  p_.kv.quantized_k.group = group;
  p_.kv.quantized_v.group = p_.value_dim / channels;
  end_ = tokens + kv.k.shape[2];
}

QuantizedTensor Checker::quantized_tensor(const TensorArg& qdata, const TensorArg& scale,
                                          const TensorArg& offset, int64_t bits, int64_t dim,
                                          int64_t scale_rows, int64_t scale_columns) {
  require(bits == 4 || bits == 8, "quantized keys and values must have 4 or 8 bits.");
  require(bits == 8 || dim % 2 == 0, "4-bit keys and values need an even head size.");
  check_tensor(qdata, "qdata", 4);
  check_dtype(qdata, "qdata", Dtype::u8);
  check_shape(qdata, "qdata", {batch_, p_.kv_heads, p_.kv.num_quantized, dim * bits / 8});
  for (const TensorArg* x : {&scale, &offset}) {
    check_tensor(*x, "scales", 4);
    check_dtype(*x, "scales", Dtype::f16);
    check_shape(*x, "scales", {batch_, p_.kv_heads, scale_rows, scale_columns});
  }
  return {strided(qdata), strided(scale), strided(offset), (int)bits, 0};
}

}  // namespace saccade
