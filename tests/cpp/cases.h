// What is computed: one line a case, small enough for an emulator.
#pragma once
#include "../../csrc/problem.h"

namespace contract {

using saccade::Dtype;
using saccade::ViewKind;

struct Case {
  const char* name;
  int64_t q_len, kv_len;
  int64_t batch = 1, heads = 4, kv_heads = 2, dim = 64, value_dim = 64;
  Dtype dtype = Dtype::f32;
  bool causal = true;
  int64_t window = -1, sinks = 0;
  double softcap = 0;
  ViewKind kind = ViewKind::dense;
  int bits_k = 8, bits_v = 8;
  int64_t recent = 0;       // keys of a quantized view that are not quantized
  bool ring = false;        // dense keys in two spans, the older ones behind the newer
  bool sink_logits = false, alibi = false, padding = false, blocks = false;
  bool backward = false;
  int threads = 1;
};

constexpr Dtype kBf16 = Dtype::bf16, kF16 = Dtype::f16;

inline const Case kCases[] = {
    {.name = "prefill", .q_len = 150, .kv_len = 150},
    {.name = "prefill, all keys", .q_len = 40, .kv_len = 130, .causal = false},
    {.name = "prefill at the end of more keys", .q_len = 70, .kv_len = 201},
    {.name = "prefill, more queries than keys", .q_len = 90, .kv_len = 50},
    {.name = "prefill, heads 6/2, odd dims", .q_len = 53, .kv_len = 97, .heads = 6, .dim = 37,
     .value_dim = 21},
    {.name = "prefill, one dim", .q_len = 33, .kv_len = 33, .dim = 1, .value_dim = 1},
    {.name = "prefill, dim 136, MQA", .q_len = 37, .kv_len = 77, .heads = 5, .kv_heads = 1,
     .dim = 136, .value_dim = 136},
    {.name = "prefill, window and sinks", .q_len = 170, .kv_len = 230, .window = 40, .sinks = 3},
    {.name = "prefill, softcap, sink logits", .q_len = 65, .kv_len = 90, .softcap = 3,
     .sink_logits = true},
    {.name = "prefill, ALiBi, padding, batch 2", .q_len = 50, .kv_len = 80, .batch = 2,
     .alibi = true, .padding = true},
    {.name = "prefill, blocks", .q_len = 96, .kv_len = 160, .blocks = true},
    {.name = "prefill, ring", .q_len = 60, .kv_len = 140, .window = 90, .ring = true},
    {.name = "prefill, three threads", .q_len = 120, .kv_len = 300, .threads = 3},
    {.name = "prefill, bf16", .q_len = 90, .kv_len = 140, .dtype = kBf16},
    {.name = "prefill, bf16, odd dims", .q_len = 45, .kv_len = 66, .dim = 35, .value_dim = 19,
     .dtype = kBf16},
    {.name = "prefill, fp16", .q_len = 90, .kv_len = 140, .dtype = kF16},
    {.name = "prefill, paged", .q_len = 60, .kv_len = 110, .kind = ViewKind::paged},
    {.name = "prefill, paged, fp16", .q_len = 60, .kv_len = 110, .dtype = kF16,
     .kind = ViewKind::paged},
    {.name = "prefill, int8", .q_len = 50, .kv_len = 180, .kind = ViewKind::quantized,
     .recent = 20},
    {.name = "prefill, 4 bits", .q_len = 50, .kv_len = 180, .kind = ViewKind::quantized,
     .bits_k = 4, .bits_v = 4, .recent = 20},
    {.name = "prefill, int8, bf16 queries", .q_len = 50, .kv_len = 180, .dtype = kBf16,
     .kind = ViewKind::quantized, .recent = 20},
    {.name = "decode", .q_len = 1, .kv_len = 333},
    {.name = "decode, 8/2", .q_len = 1, .kv_len = 500, .heads = 8},
    {.name = "decode, two queries, window", .q_len = 2, .kv_len = 300, .window = 50, .sinks = 4},
    {.name = "decode, odd dims", .q_len = 1, .kv_len = 91, .dim = 37, .value_dim = 21},
    {.name = "decode, keys split, three threads", .q_len = 1, .kv_len = 3000, .heads = 2,
     .kv_heads = 1, .threads = 3},
    {.name = "decode, softcap, sink logits", .q_len = 1, .kv_len = 120, .softcap = 3,
     .sink_logits = true},
    {.name = "decode, bf16", .q_len = 1, .kv_len = 400, .dim = 128, .value_dim = 128,
     .dtype = kBf16},
    {.name = "decode, bf16, odd dims", .q_len = 1, .kv_len = 77, .dim = 35, .value_dim = 19,
     .dtype = kBf16},
    {.name = "decode, fp16", .q_len = 1, .kv_len = 400, .dtype = kF16},
    {.name = "decode, paged, batch 2", .q_len = 1, .kv_len = 150, .batch = 2,
     .kind = ViewKind::paged},
    {.name = "decode, ring, bf16", .q_len = 1, .kv_len = 140, .dtype = kBf16, .window = 90,
     .ring = true},
    {.name = "decode, int8", .q_len = 1, .kv_len = 330, .kind = ViewKind::quantized,
     .recent = 10},
    {.name = "decode, 4 bits", .q_len = 1, .kv_len = 330, .kind = ViewKind::quantized,
     .bits_k = 4, .bits_v = 4, .recent = 10},
    {.name = "decode, int8 keys, 4-bit values, dim 96", .q_len = 1, .kv_len = 200, .dim = 96,
     .value_dim = 96, .kind = ViewKind::quantized, .bits_v = 4, .recent = 8},
    {.name = "decode, int8, bf16 queries", .q_len = 1, .kv_len = 330, .dtype = kBf16,
     .kind = ViewKind::quantized, .recent = 10},
    {.name = "decode, 4 bits, fp16 queries", .q_len = 1, .kv_len = 330, .dtype = kF16,
     .kind = ViewKind::quantized, .bits_k = 4, .bits_v = 4, .recent = 10},
    {.name = "backward", .q_len = 100, .kv_len = 100, .backward = true},
    {.name = "backward, 6/2, odd dims, at the end", .q_len = 40, .kv_len = 75, .heads = 6,
     .dim = 37, .value_dim = 21, .backward = true, .threads = 2},
    {.name = "backward, window, sinks, softcap", .q_len = 80, .kv_len = 120, .window = 30,
     .sinks = 2, .softcap = 3, .backward = true},
    {.name = "backward, bf16", .q_len = 60, .kv_len = 60, .dtype = kBf16, .backward = true},
};

}  // namespace contract
