// From Python tuples to the layers of a decoder (layer.h), checked.
#pragma once
#include "arguments.h"
#include "layer.h"

namespace saccade {

struct ReadLayer {
  Layer layer;
  double scale, softcap;
};

// (heads, kv_heads, head_dim, inner, activation, scale, softcap, residual, norms, weights): six
// norms and seven weights, in the order of layer.h.  Throws std::invalid_argument.
ReadLayer read_layer(nb::handle x, int64_t hidden);

// (weight, eps, plus_one), or None.
Norm read_norm(nb::handle x, int64_t n, const char* name);

// (matrix, bias or None); the matrix is a tensor, or packed as linear_arguments.h reads it.
Weight read_weight(nb::handle x, int64_t out, int64_t in, const char* name);

}  // namespace saccade
