// A selection of blocks of keys as plain numbers and pointers, after all checks
// (selection_arguments.cpp).  Data and no code, as in problem.h.
#pragma once
#include <cstdint>

#include "problem.h"

namespace saccade {

enum class Summary : int { none, mean, bounds, keys };  // what a row says about the keys of a
                                                        // block; keys: a row is a key

// Which blocks are read: some always, and of the others the best by their summaries.
struct BlockRule {
  Summary summary;
  int64_t q_block, k_block;
  int64_t sinks, window, stride;  // always read, in blocks; stride: every n-th, 0 for none
  int64_t top;                    // others with the highest scores; 0 where `share` says it
  float share;                    // of the estimated attention to them, 0 where `top` says it
  float scale;                    // of scores
  int64_t least;                  // keys below which a decoder reads all
};

struct Selecting {
  BlockRule rule;
  int64_t batch, heads, kv_heads, q_len, head_dim;
  Strided q;
  int64_t q_offset;  // position of the first query
  Strided rows;      // [batch, kv_heads, num_rows, head_dim], or twice head_dim: maxima, minima
  int64_t num_rows;  // blocks that have a row; later ones are always read.  Of keys: all of them
  int64_t num_blocks;
  uint8_t* out;  // [batch, kv_heads, q_blocks, num_blocks]
  int threads;
};

}  // namespace saccade
