// Calls of the kernels of packed weights as Python describes them, and their checks.
#pragma once
#include <optional>
#include <vector>

#include "call.h"
#include "linear.h"

namespace saccade {

struct PackedArg {
  TensorArg qdata, scale;
  std::optional<TensorArg> minimum;
  int64_t out, in, group, bits;
};

struct LinearArg {
  TensorArg x;
  std::vector<PackedArg> weights;
  std::vector<std::optional<TensorArg>> biases;
  std::vector<TensorArg> outs;
  int64_t gate, threads;
  std::optional<TensorArg> scratch;  // bfloat16 [rows filled up to strips of 12, in]
};

struct RowsArg {
  PackedArg weight;
  std::optional<TensorArg> index;
  int64_t first;
  TensorArg out;
  int64_t threads;
};

struct PackArg {
  int64_t kind;
  TensorArg raw;
  PackedArg weight;
  int64_t threads;
};

// All throw std::invalid_argument (a ValueError in Python) with what was expected and what came.
LinearProblem check(const LinearArg& call);
RowsProblem check(const RowsArg& call);
PackProblem check(const PackArg& call);

}  // namespace saccade
