// The shape of a call without its tensors: what the size of the workspaces depends on.
#pragma once
#include <cstdint>
#include <vector>

#include "problem.h"

namespace saccade {

struct CallShape {
  int64_t batch, heads, q_len, head_dim;
  int64_t kv_heads, kv_len, value_dim;  // kv_len: one past the last position
  bool ragged;                          // the view stores keys in no order of positions
  bool causal;
  int64_t window, sinks;     // window: -1 for none
  int64_t q_offset;          // position of the first query
  int64_t q_block, k_block;  // of block selection, 0 for none
  int64_t transformed_item;  // bytes of an element of q, if queries are transformed, 0 if not
  int64_t threads;
  bool receives;  // what each key receives is computed too
};

// A problem of this shape: its tensors have no memory, so that it can be cut into work items but
// not computed.  Each row of the batch has all kv_len keys.
struct ShapedProblem {
  Problem problem;
  std::vector<Sequence> sequences;
  std::vector<int32_t> lengths;
};

// Throws std::invalid_argument where no call can have this shape.
void make_problem(const CallShape& shape, ShapedProblem& out);

}  // namespace saccade
