// The kernels of every target that was compiled, and which of them this machine can run.
#pragma once
#include "problem.h"

namespace saccade {

struct LinearKernels;  // linear.h

struct Kernels {
  const char* name;
  void (*attend)(const Problem&);
  int64_t (*workspace_bytes)(const Problem&);  // what `attend` allocates; reads shapes only
  void (*attend_backward)(const Gradients&);
  double (*fma_flops)(int64_t steps);
  float (*fma_chains)(int64_t steps);
  float (*read_all)(const float* p, int64_t n);
  void (*exp2)(const float* x, float* y, int64_t n);  // the kernels' own, for its error bound
  const LinearKernels* linear;
};

// Targets this machine can run, best first; ends with nullptr.
const Kernels* const* usable_kernels();

// The kernels of that name, or null; the best ones for an empty name.
const Kernels* find_kernels(const char* name);

}  // namespace saccade
