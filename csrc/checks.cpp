#include "checks.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace saccade {
namespace {

// Positions are int32 in the kernels; half the range leaves room for differences of two of them.
constexpr int64_t kMaxPosition = int64_t{1} << 30;
constexpr int64_t kMaxCount = int64_t{1} << 40;

[[noreturn]] void fail(const std::string& text) { throw std::invalid_argument(text); }

void require(bool ok, const char* text) {
  if (!ok) fail(text);
}

std::string number(int64_t x) { return std::to_string(x); }

int64_t item_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
    case Dtype::i32: return 4;
    case Dtype::bf16:
    case Dtype::f16: return 2;
    case Dtype::i64: return 8;
    default: return 1;
  }
}

bool is_float(Dtype d) { return d == Dtype::f32 || d == Dtype::bf16 || d == Dtype::f16; }

bool is_empty(const TensorArg& x) {
  return std::any_of(x.shape, x.shape + x.ndim, [](int64_t n) { return n == 0; });
}

// Bytes from the first to one past the last element; every product is checked for overflow.
int64_t extent(const TensorArg& x, const char* name) {
  int64_t last = 0;
  for (int i = 0; i < x.ndim; ++i) {
    int64_t step;
    if (__builtin_mul_overflow(x.shape[i] - 1, x.stride[i], &step) ||
        __builtin_add_overflow(last, step, &last) || last > kMaxCount)
      fail(std::string(name) + ": strides reach beyond any memory.");
  }
  return (last + 1) * item_size(x.dtype);
}

void check_tensor(const TensorArg& x, const char* name, int ndim, bool unit_last = true) {
  const std::string who = name;
  if (x.ndim != ndim)
    fail(who + " must have " + number(ndim) + " dimensions, got " + number(x.ndim) + ".");
  for (int i = 0; i < ndim; ++i) {
    if (x.shape[i] < 0 || x.shape[i] > kMaxCount)
      fail(who + ": size " + number(x.shape[i]) + " of dimension " + number(i) + " is impossible.");
    if (x.stride[i] < 0) fail(who + ": negative strides are not supported.");
  }
  if (is_empty(x)) return;
  if (unit_last && ndim > 0 && x.shape[ndim - 1] > 1 && x.stride[ndim - 1] != 1)
    fail(who + " must have a unit last stride, got " + number(x.stride[ndim - 1]) + ".");
  const int64_t bytes = extent(x, name);
  if (x.data == nullptr) fail(who + " has no memory.");
  if ((uintptr_t)x.data % item_size(x.dtype)) fail(who + " is not aligned to its element size.");
  if (bytes > x.reach)
    fail(who + " needs " + number(bytes) + " bytes of storage but has " + number(x.reach) + ".");
}

void check_shape(const TensorArg& x, const char* name, std::initializer_list<int64_t> shape) {
  int i = 0;
  for (int64_t n : shape) {
    if (x.shape[i] != n)
      fail(std::string(name) + ": dimension " + number(i) + " must be " + number(n) + ", got " +
           number(x.shape[i]) + ".");
    ++i;
  }
}

void check_dtype(const TensorArg& x, const char* name, Dtype dtype) {
  if (x.dtype != dtype) fail(std::string(name) + " has the wrong dtype.");
}

// No two elements of a tensor that is written to may share memory.
void check_no_self_overlap(const TensorArg& x, const char* name) {
  int order[TensorArg::kMaxDims], n = 0;
  for (int i = 0; i < x.ndim; ++i)
    if (x.shape[i] > 1) order[n++] = i;
  std::sort(order, order + n, [&](int a, int b) { return x.stride[a] < x.stride[b]; });
  int64_t covered = 1;
  for (int i = 0; i < n; ++i) {
    if (x.stride[order[i]] < covered) fail(std::string(name) + " overlaps itself.");
    covered = x.stride[order[i]] * (x.shape[order[i]] - 1) + covered;
  }
}

void check_apart(const TensorArg& written, const char* name, const TensorArg& other,
                 const char* other_name) {
  if (is_empty(written) || is_empty(other)) return;
  const char* end = written.data + extent(written, name);
  const char* other_end = other.data + extent(other, other_name);
  if (written.data < other_end && other.data < end)
    fail(std::string(name) + " overlaps " + other_name + " in memory.");
}

// Dimensions 0, 1 and 2 of a four-dimensional tensor.
Strided strided(const TensorArg& x) {
  const int64_t size = item_size(x.dtype);
  return {x.data, x.dtype, x.stride[0] * size, x.stride[1] * size, x.stride[2] * size};
}

int64_t broadcast_stride(const TensorArg& x, int dim) {
  return x.shape[dim] == 1 ? 0 : x.stride[dim];
}

ByteGrid grid(const TensorArg& x) {
  return {(const uint8_t*)x.data, broadcast_stride(x, 0), broadcast_stride(x, 1), x.stride[2],
          x.stride[3]};
}

void check_broadcast(const TensorArg& x, const char* name, int64_t batch, int64_t heads) {
  const bool ok = (x.shape[0] == 1 || x.shape[0] == batch) && (x.shape[1] == 1 || x.shape[1] == heads);
  if (!ok) fail(std::string(name) + " must have batch and heads of the call, or 1.");
}

int64_t integer_at(const TensorArg& x, int64_t i) {
  const char* at = x.data + i * x.stride[0] * item_size(x.dtype);
  return x.dtype == Dtype::i64 ? *(const int64_t*)at : *(const int32_t*)at;
}

class Checker {
 public:
  Checker(const CallArg& call, CheckedProblem& checked)
      : c_(call), r_(checked), p_(checked.problem) {}

  void run() {
    p_ = Problem{};
    check_queries();
    check_view();
    check_outputs();
    check_mask();
    check_extras();
    make_sequences();
    p_.kv.spans = r_.spans.data();
    p_.kv.num_spans = (int64_t)r_.spans.size();
    p_.sequences = r_.sequences.data();
    p_.num_sequences = (int64_t)r_.sequences.size();
  }

 private:
  void check_queries() {
    check_tensor(c_.q, "q", 4);
    require(is_float(c_.q.dtype), "q must be float32, bfloat16 or float16.");
    batch_ = c_.q.shape[0];
    p_.heads = c_.q.shape[1];
    q_len_ = c_.q.shape[2];
    p_.head_dim = c_.q.shape[3];
    require(p_.head_dim >= 1 && p_.head_dim <= kMaxDim, "head_dim must be 1 to 576.");
    require(q_len_ <= kMaxPosition, "q_len is too large.");
    p_.q = strided(c_.q);
    require(c_.threads >= 1 && c_.threads <= 4096, "threads must be 1 to 4096.");
    p_.threads = (int)c_.threads;
  }

  void check_view() {
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

  void check_kv_tensors(int ndim) {
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

  void check_dense() {
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

  // Every table entry that a length makes reachable must name a page.
  void check_table_row(const int32_t* row, int64_t stride, int64_t max_pages, int64_t length) {
    const int64_t size = p_.kv.page_size, pages = c_.kv.k.shape[0];
    if (length < 0 || length > max_pages * size)
      fail("a length of " + number(length) + " does not fit into " + number(max_pages) +
           " pages of " + number(size) + ".");
    for (int64_t i = 0; i * size < length; ++i) {
      const int32_t page = row[i * stride];
      if (page < 0 || page >= pages)
        fail("table entry " + number(page) + " is not one of the " + number(pages) + " pages.");
    }
  }

  void check_paged() {
    check_kv_tensors(4);
    p_.kv_heads = c_.kv.k.shape[1];
    p_.kv.page_size = c_.kv.k.shape[2];
    require(p_.kv.page_size >= 1, "page_size must be at least 1.");
    require(c_.kv.table && c_.kv.lengths, "a paged view needs a table and lengths.");
    const TensorArg &table = *c_.kv.table, &lengths = *c_.kv.lengths;
    check_tensor(table, "table", 2);
    check_dtype(table, "table", Dtype::i32);
    check_tensor(lengths, "lengths of the view", 1, false);
    check_dtype(lengths, "lengths of the view", Dtype::i32);
    check_shape(lengths, "lengths of the view", {batch_});
    require(table.shape[0] == batch_, "the table must have one row for each row of q.");
    p_.kv.table = (const int32_t*)table.data;
    p_.kv.table_batch = table.stride[0];
    end_ = 0;
    for (int64_t b = 0; b < batch_; ++b) {
      const int64_t length = integer_at(lengths, b);
      check_table_row(p_.kv.table + b * table.stride[0], 1, table.shape[1], length);
      end_ = std::max(end_, length);
    }
  }

  void check_ragged() {
    check_kv_tensors(3);
    const TensorArg &k = c_.kv.k, &v = c_.kv.v;
    p_.kv.page_size = k.shape[1];
    require(p_.kv.page_size >= 1, "page_size must be at least 1.");
    require(c_.kv.table && c_.kv.lengths && c_.kv.positions,
            "a ragged view needs a table, lengths and positions.");
    const TensorArg &table = *c_.kv.table, &lengths = *c_.kv.lengths, &at = *c_.kv.positions;
    check_tensor(table, "table", 3);
    check_dtype(table, "table", Dtype::i32);
    check_tensor(lengths, "lengths of the view", 2, false);
    check_dtype(lengths, "lengths of the view", Dtype::i32);
    check_tensor(at, "positions", 2);
    check_dtype(at, "positions", Dtype::i32);
    check_shape(at, "positions", {k.shape[0], k.shape[1]});
    require(table.shape[0] == batch_, "the table must have one row for each row of q.");
    p_.kv_heads = table.shape[1];
    check_shape(lengths, "lengths of the view", {batch_, p_.kv_heads});
    p_.kv.k = {k.data, k.dtype, k.stride[0] * item_size(k.dtype), 0, k.stride[1] * item_size(k.dtype)};
    p_.kv.v = {v.data, v.dtype, v.stride[0] * item_size(v.dtype), 0, v.stride[1] * item_size(v.dtype)};
    p_.kv.table = (const int32_t*)table.data;
    p_.kv.table_batch = table.stride[0];
    p_.kv.table_head = table.stride[1];
    p_.kv.positions = (const int32_t*)at.data;
    p_.kv.positions_page = at.stride[0];
    p_.kv.lengths = (const int32_t*)lengths.data;
    p_.kv.lengths_batch = lengths.stride[0];
    p_.kv.lengths_head = lengths.stride[1];
    for (int64_t b = 0; b < batch_; ++b)
      for (int64_t h = 0; h < p_.kv_heads; ++h)
        check_table_row(p_.kv.table + b * table.stride[0] + h * table.stride[1], 1, table.shape[2],
                        p_.kv.lengths[b * lengths.stride[0] + h * lengths.stride[1]]);
    end_ = kMaxPosition;  // positions are compared, never used as an index
    require(!c_.key_padding && !c_.blocks && !c_.attn_mask,
            "a ragged view takes no key_padding, blocks or attn_mask.");
  }

  void check_quantized() {
    check_kv_tensors(4);
    require(c_.kv.k.shape[0] == batch_, "q and k must share the batch.");
    p_.kv_heads = c_.kv.k.shape[1];
    require(c_.kv.k_codes && c_.kv.k_scale && c_.kv.k_offset && c_.kv.v_codes && c_.kv.v_scale &&
                c_.kv.v_offset,
            "a quantised view needs codes, scales and offsets of keys and values.");
    check_tensor(*c_.kv.k_codes, "codes", 4);
    const int64_t packed = c_.kv.k_codes->shape[2], group = c_.kv.k_group;
    require(group >= 1 && packed % group == 0, "quantised keys must fill whole groups.");
    require(c_.kv.v_scale->ndim == 4, "scales must have 4 dimensions.");
    const int64_t channels = c_.kv.v_scale->shape[3];
    require(channels >= 1 && p_.value_dim % channels == 0,
            "the channels of a value must fill whole groups.");
    check_codes(*c_.kv.k_codes, *c_.kv.k_scale, *c_.kv.k_offset, c_.kv.bits_k, packed, p_.head_dim,
                packed / group, p_.head_dim, p_.kv.k_codes);
    check_codes(*c_.kv.v_codes, *c_.kv.v_scale, *c_.kv.v_offset, c_.kv.bits_v, packed, p_.value_dim,
                packed, channels, p_.kv.v_codes);
    p_.kv.k_codes.group = group;
    p_.kv.v_codes.group = p_.value_dim / channels;
    p_.kv.num_packed = packed;
    end_ = packed + c_.kv.k.shape[2];
  }

  void check_codes(const TensorArg& codes, const TensorArg& scale, const TensorArg& offset,
                   int64_t bits, int64_t tokens, int64_t dim, int64_t scale_rows,
                   int64_t scale_columns, Codes& out) {
    require(bits == 4 || bits == 8, "codes must have 4 or 8 bits.");
    require(bits == 8 || dim % 2 == 0, "4-bit codes need an even head size.");
    check_tensor(codes, "codes", 4);
    check_dtype(codes, "codes", Dtype::u8);
    check_shape(codes, "codes", {batch_, p_.kv_heads, tokens, dim * bits / 8});
    for (const TensorArg* x : {&scale, &offset}) {
      check_tensor(*x, "scales", 4);
      check_dtype(*x, "scales", Dtype::f16);
      check_shape(*x, "scales", {batch_, p_.kv_heads, scale_rows, scale_columns});
    }
    out = {strided(codes), strided(scale), strided(offset), (int)bits, 0};
  }

  void check_outputs() {
    check_tensor(c_.out, "out", 4);
    check_dtype(c_.out, "out", c_.q.dtype);
    check_shape(c_.out, "out", {batch_, p_.heads, q_len_, p_.value_dim});
    check_written(c_.out, "out");
    p_.out = strided(c_.out);
    if (!c_.lse) return;
    check_tensor(*c_.lse, "lse", 3);
    check_dtype(*c_.lse, "lse", Dtype::f32);
    check_shape(*c_.lse, "lse", {batch_, p_.heads, q_len_});
    check_written(*c_.lse, "lse");
    check_apart(c_.out, "out", *c_.lse, "lse");
    p_.lse = (float*)c_.lse->data;
    p_.lse_batch = c_.lse->stride[0];
    p_.lse_head = c_.lse->stride[1];
  }

  void check_written(const TensorArg& x, const char* name) {
    check_no_self_overlap(x, name);
    check_apart(x, name, c_.q, "q");
    check_apart(x, name, c_.kv.k, "k");
    check_apart(x, name, c_.kv.v, "v");
    for (const auto* other : {&c_.kv.table, &c_.kv.lengths, &c_.kv.positions, &c_.kv.k_codes,
                              &c_.kv.k_scale, &c_.kv.k_offset, &c_.kv.v_codes, &c_.kv.v_scale,
                              &c_.kv.v_offset})
      if (*other) check_apart(x, name, **other, "the key/value view");
  }

  void check_mask() {
    p_.causal = c_.causal;
    require(c_.window == -1 || (c_.window >= 1 && c_.causal), "window must be at least 1, and causal.");
    require(c_.sinks >= 0, "sinks must not be negative.");
    p_.window = c_.window == -1 || c_.window > 2 * kMaxPosition ? kUnlimited : c_.window;
    p_.sinks = std::min(c_.sinks, kMaxPosition);
    require(c_.scale == c_.scale, "scale must be a number.");
    require(c_.softcap >= 0, "softcap must be positive.");
    p_.scale = (float)c_.scale;
    p_.softcap = (float)c_.softcap;
  }

  void check_extras() {
    if (c_.sink_logits) {
      check_tensor(*c_.sink_logits, "sink_logits", 1);
      check_dtype(*c_.sink_logits, "sink_logits", Dtype::f32);
      check_shape(*c_.sink_logits, "sink_logits", {p_.heads});
      p_.sink_logits = (const float*)c_.sink_logits->data;
    }
    if (c_.alibi) {
      check_tensor(*c_.alibi, "alibi_slopes", 2);
      check_dtype(*c_.alibi, "alibi_slopes", Dtype::f32);
      require(c_.alibi->shape[0] == 1 || c_.alibi->shape[0] == batch_,
              "alibi_slopes must have batch 1 or that of the call.");
      require(c_.alibi->shape[1] == p_.heads, "alibi_slopes must have one slope for each head.");
      p_.alibi = (const float*)c_.alibi->data;
      p_.alibi_batch = broadcast_stride(*c_.alibi, 0);
    }
    if (c_.key_padding) {
      const TensorArg& x = *c_.key_padding;
      check_tensor(x, "key_padding", 2, false);
      check_dtype(x, "key_padding", Dtype::boolean);
      require(x.shape[0] == batch_ && x.shape[1] >= end_, "key_padding must be [batch, kv_len].");
      p_.key_padding = {(const uint8_t*)x.data, x.stride[0], 0, 0, x.stride[1]};
    }
    check_grids();
  }

  void check_grids() {
    if (c_.blocks) {
      const TensorArg& x = *c_.blocks;
      check_tensor(x, "blocks", 4, false);
      check_dtype(x, "blocks", Dtype::boolean);
      check_broadcast(x, "blocks", batch_, p_.kv_heads);
      require(c_.q_block >= 1 && c_.k_block >= 1, "block sizes must be at least 1.");
      require(c_.q_block <= kMaxPosition && c_.k_block <= kMaxPosition, "block sizes are too large.");
      require(x.shape[2] * c_.q_block >= q_len_ && x.shape[3] * c_.k_block >= end_,
              "blocks must cover all queries and keys.");
      p_.blocks = grid(x);
      p_.q_block = c_.q_block;
      p_.k_block = c_.k_block;
    }
    if (c_.attn_mask) {
      const TensorArg& x = *c_.attn_mask;
      check_tensor(x, "attn_mask", 4, false);
      check_dtype(x, "attn_mask", Dtype::boolean);
      check_broadcast(x, "attn_mask", batch_, p_.heads);
      require(x.shape[2] >= q_len_ && x.shape[3] >= end_, "attn_mask must cover queries and keys.");
      p_.attn_mask = grid(x);
    }
  }

  void make_sequences() {
    r_.sequences.clear();
    if (is_empty(c_.q)) return;
    if (c_.cu_q || c_.cu_k) return make_documents();
    if (c_.lengths) check_integers(*c_.lengths, "lengths", batch_);
    if (c_.q_offsets) check_integers(*c_.q_offsets, "q_offset", batch_);
    for (int64_t b = 0; b < batch_; ++b) {
      int64_t keys = end_;
      if (c_.kv.kind == ViewKind::paged) keys = integer_at(*c_.kv.lengths, b);
      if (c_.lengths) {
        const int64_t length = integer_at(*c_.lengths, b);
        require(length >= 0, "lengths must not be negative.");
        keys = std::min(keys, length);
      }
      const int64_t offset = c_.q_offsets ? integer_at(*c_.q_offsets, b) : c_.q_offset;
      require(offset >= -kMaxPosition && offset <= kMaxPosition - q_len_ + 1,
              "q_offset lies beyond the largest supported position.");
      r_.sequences.push_back({b, 0, q_len_, 0, keys, offset});
    }
  }

  void check_integers(const TensorArg& x, const char* name, int64_t size) {
    check_tensor(x, name, 1, false);
    require(x.dtype == Dtype::i32 || x.dtype == Dtype::i64, "integers must be int32 or int64.");
    check_shape(x, name, {size});
  }

  void make_documents() {
    require(c_.cu_q && c_.cu_k, "cu_seqlens must be given for queries and keys.");
    require(batch_ == 1 && c_.kv.kind == ViewKind::dense, "cu_seqlens needs one dense packed row.");
    require(!c_.key_padding && !c_.blocks && !c_.attn_mask && !c_.lengths && !c_.q_offsets,
            "cu_seqlens cannot be combined with padding, lengths, blocks or masks.");
    require(c_.cu_q->ndim == 1 && c_.cu_q->shape[0] >= 1, "cu_seqlens must have one dimension.");
    const int64_t n = c_.cu_q->shape[0];
    check_integers(*c_.cu_q, "cu_seqlens of queries", n);
    check_integers(*c_.cu_k, "cu_seqlens of keys", n);
    require(integer_at(*c_.cu_q, 0) == 0 && integer_at(*c_.cu_k, 0) == 0 &&
                integer_at(*c_.cu_q, n - 1) == q_len_ && integer_at(*c_.cu_k, n - 1) == end_,
            "cu_seqlens must rise from 0 to the packed length.");
    for (int64_t i = 0; i + 1 < n; ++i) {
      const int64_t q = integer_at(*c_.cu_q, i), k = integer_at(*c_.cu_k, i);
      const int64_t q_len = integer_at(*c_.cu_q, i + 1) - q, k_len = integer_at(*c_.cu_k, i + 1) - k;
      require(q_len >= 0 && k_len >= 0 && q + q_len <= q_len_ && k + k_len <= end_,
              "cu_seqlens must not fall.");
      r_.sequences.push_back({0, q, q_len, k, k_len, k_len - q_len});
    }
  }

  const CallArg& c_;
  CheckedProblem& r_;
  Problem& p_;
  int64_t batch_ = 0, q_len_ = 0, end_ = 0;
};

}  // namespace

void check(const CallArg& call, CheckedProblem& checked) { Checker(call, checked).run(); }

void check(const BackwardArg& b, CheckedGradients& checked) {
  const CallArg& c = b.call;
  check(c, checked.forward);
  const Problem& p = checked.forward.problem;
  require(c.kv.kind == ViewKind::dense && c.kv.spans.empty() && !c.blocks && !c.attn_mask,
          "the backward pass takes plain dense views, without blocks or attn_mask.");
  require(c.lse.has_value(), "the backward pass needs the lse.");
  const int64_t batch = c.q.shape[0], q_len = c.q.shape[2], keys = c.kv.k.shape[2];
  check_tensor(b.d_out, "d_out", 4);
  check_dtype(b.d_out, "d_out", c.q.dtype);
  check_shape(b.d_out, "d_out", {batch, p.heads, q_len, p.value_dim});
  check_tensor(b.dk, "dk", 4);
  check_dtype(b.dk, "dk", c.kv.k.dtype);
  check_shape(b.dk, "dk", {batch, p.kv_heads, keys, p.head_dim});
  check_tensor(b.dv, "dv", 4);
  check_dtype(b.dv, "dv", c.kv.v.dtype);
  check_shape(b.dv, "dv", {batch, p.kv_heads, keys, p.value_dim});
  check_tensor(b.delta, "delta", 3);
  check_dtype(b.delta, "delta", Dtype::f32);
  check_shape(b.delta, "delta", {batch, p.heads, q_len});
  check_tensor(b.dq, "dq", 5);
  check_dtype(b.dq, "dq", Dtype::f32);
  const int64_t padded = (p.head_dim + 31) / 32 * 32;
  require(b.dq.shape[0] >= 1, "dq needs at least one chunk.");
  check_shape(b.dq, "dq", {b.dq.shape[0], batch, p.heads, q_len, padded});
  const TensorArg* rows[] = {&*c.lse, &b.delta};
  for (const TensorArg* x : rows)
    require(x->shape[2] <= 1 || (x->stride[1] == q_len && x->stride[0] == p.heads * q_len) ||
                is_empty(*x),
            "lse and delta must be contiguous.");
  require(is_empty(b.dq) || (b.dq.stride[3] == padded && b.dq.stride[2] == padded * q_len &&
                             b.dq.stride[1] == padded * q_len * p.heads),
          "dq must be contiguous.");
  const TensorArg* written[] = {&b.dq, &b.dk, &b.dv};
  for (const TensorArg* x : written) {
    check_no_self_overlap(*x, "a gradient");
    const TensorArg* read[] = {&c.q, &c.kv.k, &c.kv.v, &c.out, &*c.lse, &b.d_out, &b.delta};
    for (const TensorArg* other : read) check_apart(*x, "a gradient", *other, "an input");
    for (const TensorArg* other : written)
      if (other != x) check_apart(*x, "a gradient", *other, "another gradient");
  }
  checked.gradients = {&p, strided(b.d_out), strided(b.dk), strided(b.dv),
                       (const float*)c.lse->data, (const float*)b.delta.data, p.heads * q_len, q_len,
                       (float*)b.dq.data, b.dq.stride[0], b.dq.shape[0]};
}

}  // namespace saccade
