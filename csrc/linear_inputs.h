// The rows of x as the products read them.
#pragma once
#include "arena.h"
#include "linear_simd.h"
#include "workspace.h"

namespace saccade::SACCADE_TARGET {

constexpr int kSum = 16;  // numbers of a row that are added up for the minima

#if defined(SACCADE_DOT)
constexpr bool kDots = true;  // numbers of 4 and 6 bits are multiplied as bfloat16
#else
constexpr bool kDots = false;
#endif

// x is high + low, each bfloat16, up to 2^-17 of it; low is null where high is all of it.
struct Inputs {
  float* wide;   // [rows][in], where some weight needs it
  Bf16 *high, *low;
  float* sums;   // [rows][in / kSum], where some weight has a minimum
  int64_t in;
};

SACCADE_INLINE Inputs place_inputs(const LinearProblem& p, Arena& arena) {
  bool wide = false, pairs = false, sums = false;
  for (int i = 0; i < p.num_weights; ++i) {
    const bool dots = kDots && p.weights[i].bits != 8;
    wide |= !dots;
    pairs |= dots;
    sums |= p.weights[i].minimum != nullptr;
  }
  const int64_t n = p.rows * p.in;
  Inputs x{};
  x.in = p.in;
  if (wide) x.wide = arena.take<float>(n);
  if (pairs) x.high = arena.take<Bf16>(n);
  if (pairs && p.x.dtype != Dtype::bf16) x.low = arena.take<Bf16>(n);
  if (sums) x.sums = arena.take<float>(n / kSum);
  return x;
}

// Sixteen numbers of row r from column k.
SACCADE_INLINE void read_sixteen(const LinearProblem& p, const Inputs& x, int64_t r, int64_t k) {
  const char* from = p.x.data + r * p.x.row;
  const int64_t to = r * x.in + k;
  F sum = zero();
  for (int i = 0; i < kSum; i += W) {
    const F value = load_any(from, p.x.dtype, k + i);
    sum = add(sum, value);
    if (x.wide) store(x.wide + to + i, value);
    if (!x.high) continue;
    store(x.high + to + i, value);
    if (!x.low) continue;
    const F high = load(x.high + to + i);
    store(x.low + to + i, select(lt(abs(high), set1(kInf)), sub(value, high), zero()));
  }
  if (x.sums) x.sums[to / kSum] = hsum(sum);
}

SACCADE_INLINE Inputs read_inputs(const LinearProblem& p) {
  Arena sizes(nullptr);
  place_inputs(p, sizes);
  Arena arena(workspace(WorkspaceSlot::call, (size_t)sizes.bytes()));
  const Inputs x = place_inputs(p, arena);
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t k = 0; k < p.in; k += kSum) read_sixteen(p, x, r, k);
  return x;
}

}  // namespace saccade::SACCADE_TARGET
