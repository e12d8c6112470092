// Products with packed weights as plain numbers and pointers, after all checks (check_linear.h).
//
// Data and no code, as in problem.h.  A packed matrix [out, in] lies in blocks of 16 rows, the last
// one filled up with zeros:
//   4 bits  [block][in / 8][row]: 32 bits, the nibbles of columns 0 2 4 6 1 3 5 7 from the lowest,
//           so that columns 2 j and 2 j + 1 lie in the two halves, at the same place
//   6 bits  [block][in / 16][3][row]: 32 bits, the low nibbles of eight columns and of the next eight
//           as above, then the upper two bits of all sixteen, columns 0 2 4 .. 14 1 3 5 .. 15
//   8 bits  [block][in][row]: int8
//   scale, minimum  [block][in / group][row]: float16
#pragma once
#include <cstdint>

#include "problem.h"

namespace saccade {

constexpr int kBlockRows = 16;
constexpr int kMaxWeights = 8;  // of one call
constexpr int kStripRows = 12;  // of x that are multiplied at once where they are many

struct PackedMatrix {
  uint8_t* qdata;
  uint16_t *scale, *minimum;  // minimum: null where every one is 0
  int64_t out, in, group;
  int bits;
};

// A matrix with a unit stride in its rows; `row` is in bytes.
struct Matrix {
  char* data;
  Dtype dtype;
  int64_t row;
};

// Numbers of one dtype, or none where data is null.
struct Vector {
  const char* data;
  Dtype dtype;
};

enum class Gate : int { none, silu, gelu_tanh };

// out[i] = x times the transposed weights[i], plus bias[i]; with a gate there are two weights and
// one output, gate(x weights[0]) * (x weights[1]).
struct LinearProblem {
  Matrix x;
  int64_t rows, in;
  int num_weights, num_outs;
  PackedMatrix weights[kMaxWeights];
  Vector bias[kMaxWeights];
  Matrix out[kMaxWeights];
  Gate gate;
  int threads;
  char* scratch;  // for many rows: rows, filled up to strips, x in of bfloat16; else null
};

// out [n, in]: rows `index` of the weight, or the n rows from `first` where index is null.
struct RowsProblem {
  PackedMatrix weight;
  const int64_t* index;
  int64_t first, n;
  Matrix out;
  int threads;
};

enum class BlockKind : int { q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k, f32, bf16, f16 };

// Blocks of a GGUF file, or plain numbers that are rounded to nearest -> packed.
struct PackProblem {
  BlockKind kind;
  const uint8_t* raw;
  int64_t row;  // bytes from one row to the next
  PackedMatrix weight;
  int threads;
};

struct LinearKernels {
  void (*products)(const LinearProblem&);
  void (*read_rows)(const RowsProblem&);
  bool (*pack)(const PackProblem&);  // false where a scale leaves the range of float16
};

}  // namespace saccade
