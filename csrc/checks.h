// Checks of everything that comes from Python, before a kernel runs.
#pragma once
#include <vector>

#include "call.h"
#include "problem.h"

namespace saccade {

// A checked problem together with what it points to.
struct CheckedProblem {
  Problem problem;
  std::vector<Sequence> sequences;
  std::vector<Span> spans;
};

struct CheckedGradients {
  CheckedProblem forward;
  Gradients gradients;
};

// Both throw std::invalid_argument (a ValueError in Python) with what was expected and what came.
void check(const CallArg& call, CheckedProblem& checked);
void check(const BackwardArg& call, CheckedGradients& checked);

}  // namespace saccade
