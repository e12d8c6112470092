// One decoder layer as the kernels take it, after all checks (decoder.cpp).
//
// A layer is: q, k, v of norm(x), rotated; [the cache stores k and v, attention runs];
// x += m norm(o(attended)); x += m norm(down(act(gate(norm(x))) * up(norm(x)))), m a number.  Norms
// may be missing.
// Data and no code, as in problem.h.  The residual stream x is float32, whatever the weights are.
#pragma once
#include <cstdint>

#include "linear.h"
#include "problem.h"

namespace saccade {

// Plain numbers; data is null where there are none.
struct Numbers {
  const char* data = nullptr;
  Dtype dtype = Dtype::f32;
};

// A matrix `[out, in]`, packed or of plain numbers, and the bias `[out]` added to its products.
struct Weight {
  int64_t out = 0, in = 0;
  bool is_packed = false;
  PackedMatrix packed = {};
  Numbers numbers, bias;  // numbers: contiguous
};

// weight * x / rms(x), or (1 + weight) * x / rms(x); without a weight x itself.
struct Norm {
  Numbers weight;
  float eps = 0;
  bool plus_one = false;
  int64_t size = 0;  // of x
};

enum class Activation : int { silu, gelu_tanh };

struct Layer {
  int64_t hidden, heads, kv_heads, head_dim, inner;
  float residual;  // what is added to x is multiplied by it
  Norm attention_norm, attended_norm, mlp_norm, mlp_out_norm;
  Norm q_norm, k_norm;  // of each head, or of all heads of a row
  Weight q, k, v, o, gate, up, down;
  Activation activation;
};

constexpr int64_t kMaxRows = 9;  // of x in one step: a token and up to eight drafted behind it

// What storing changes about keys and values beside their dtype.
struct Storing {
  bool hadamard = false;  // they are transformed, a head in blocks of powers of two
  bool bounded = false;   // they have to fit into float16, neither too large nor all too small
};

// Rows of x are those of `batch` sequences with `tokens` tokens each: row b * tokens + t.
struct LayerFront {
  const float* x;
  int64_t batch, tokens;
  const float *cos, *sin;  // [tokens, rotated]
  int64_t rotated;         // channels of a head that are rotated, the first ones
  float* q;                // [rows, heads, head_dim]
  Strided k, v;            // where they are stored: [batch, kv_heads, tokens, head_dim]
  Storing storing;
  float* scratch;
  int threads;
};

struct LayerBack {
  float* x;
  const float* attended;  // [rows, heads * head_dim]
  int64_t rows;
  float* scratch;
  int threads;
};

struct Selecting;  // selection.h

struct StepKernels {
  // False where numbers are not stored because they are out of bounds.
  bool (*front)(const Layer&, const LayerFront&);
  void (*back)(const Layer&, const LayerBack&);
  // y `[rows, out]` = products of the rows of x with a weight.
  void (*multiply)(const Weight&, const float* x, int64_t rows, float* y, int threads);
  void (*normalize)(const Norm&, const float* x, int64_t n, float* y);
  // Numbers of a dtype from floats, and floats from them.
  void (*narrow)(const float* x, int64_t n, Numbers to);
  void (*widen)(Numbers x, int64_t n, float* y);
  void (*select_blocks)(const Selecting&);
};

}  // namespace saccade
