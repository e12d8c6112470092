// The contract of the C++ kernels without Python: every case by every target of this machine.
//
//   contract            all targets that it can run
//   contract neon       those named
//
// A kernel may err twice as much as an eager run in float32 whose result is rounded to the storage
// type, plus a small allowance (the same as tests/support/tolerance.py).  Each case also shows that
// its check can fail: the result without the key that the last query weighs most is refused.
#include <cstdio>
#include <string>

#include "../../csrc/checks.h"
#include "../../csrc/dispatch.h"
#include "bounds.h"
#include "expected.h"
#if __has_include("../../csrc/linear.h")
#include "linear_contract.h"
#endif

namespace contract {
namespace {

using saccade::Kernels;

constexpr double kLseAllowance = 1e-4, kReceivedAllowance = 1e-4;

struct Verdict {
  double error = 0;    // of out and gradients, as a share of what is allowed
  double lse = 0;      // the same of the lse
  double received = 0;  // the same of what keys receive
  double damaged = 0;  // of a wrong result: has to be above 1
};

void run_backward(const Kernels& kernels, Inputs& in, const Array& dout,
                  const Result<double>& truth, const Result<float>& eager, Verdict& verdict) {
  const Case& c = in.c;
  const int64_t padded = (c.dim + saccade::kDqPad - 1) / saccade::kDqPad * saccade::kDqPad;
  Array delta(Dtype::f32, {c.batch, c.heads, c.q_len});
  Array dq(Dtype::f32, {c.threads, c.batch, c.heads, c.q_len, padded});
  Array dk(c.dtype, in.k.shape), dv(c.dtype, in.v.shape);
  for (int64_t row = 0; row < delta.size(); ++row) {
    double sum = 0;
    for (int64_t d = 0; d < c.value_dim; ++d)
      sum += in.out.get(row * c.value_dim + d) * dout.get(row * c.value_dim + d);
    delta.set(row, sum);
  }
  saccade::CheckedGradients checked;
  saccade::check({in.call, dout.arg(), delta.arg(), dq.arg(), dk.arg(), dv.arg()}, checked);
  kernels.attend_backward(checked.gradients);
  auto dq_at = [&](size_t i) {  // the parts of all chunks; the scale is the caller's
    double sum = 0;
    for (int64_t chunk = 0; chunk < c.threads; ++chunk)
      sum += dq.get((chunk * delta.size() + (int64_t)i / c.dim) * padded + (int64_t)i % c.dim);
    return rounded(c.dtype, sum * in.scale_of_scores());
  };
  verdict.error = std::max(verdict.error, share(c.dtype, truth.dq, eager.dq, dq_at));
  verdict.error = std::max(verdict.error, share(c.dtype, truth.dk, eager.dk,
                                                [&](size_t i) { return dk.get((int64_t)i); }));
  verdict.error = std::max(verdict.error, share(c.dtype, truth.dv, eager.dv,
                                                [&](size_t i) { return dv.get((int64_t)i); }));
}

// What keys receive, summed or the largest, with the attention of the same call.
void run_received(const Kernels& kernels, Inputs& in, const Result<double>& truth, bool largest,
                  Verdict& verdict) {
  const Case& c = in.c;
  Array received(Dtype::f32, {c.batch, c.kv_heads, c.kv_len});
  saccade::CallArg call = in.call;
  call.received = received.arg();
  call.largest = largest;
  saccade::CheckedProblem checked;
  saccade::check(call, checked);
  kernels.attend(checked.problem);
  const auto& right = largest ? truth.largest : truth.received;
  const double error = distance(right, [&](size_t i) { return received.get((int64_t)i); });
  verdict.received = std::max(verdict.received, error / kReceivedAllowance);
}

Verdict run(const Kernels& kernels, const Case& c) {
  source.seed(2205);
  Inputs in(c);
  Array dout;
  if (c.backward) dout = random(c.dtype, in.out.shape);
  const Array* gradient = c.backward ? &dout : nullptr;
  const Result<double> truth = attend<double>(in, gradient);
  const Result<float> eager = attend<float>(in, gradient);
  const Result<double> wrong = attend<double>(in, nullptr, heaviest(in));
  Verdict verdict;
  auto wrong_at = [&](size_t i) { return rounded(c.dtype, wrong.out[i]); };
  verdict.damaged = share(c.dtype, truth.out, eager.out, wrong_at);

  saccade::CheckedProblem checked;
  saccade::check(in.call, checked);
  kernels.attend(checked.problem);
  auto out_at = [&](size_t i) { return in.out.get((int64_t)i); };
  auto lse_at = [&](size_t i) { return in.lse.get((int64_t)i); };
  verdict.error = share(c.dtype, truth.out, eager.out, out_at);
  verdict.lse = distance(truth.lse, lse_at) / kLseAllowance;
  for (bool largest : {false, true}) run_received(kernels, in, truth, largest, verdict);
  if (c.backward) run_backward(kernels, in, dout, truth, eager, verdict);
  return verdict;
}

// The number of cases that failed.
int run_target(const Kernels& kernels) {
  int failed = 0;
  for (const Case& c : kCases) {
    std::string problem;
    Verdict verdict;
    try {
      verdict = run(kernels, c);
      if (!(verdict.error <= 1)) problem = "WRONG";
      if (!(verdict.lse <= 1)) problem = "WRONG lse";
      if (!(verdict.received <= 1)) problem = "WRONG received";
      if (!(verdict.damaged > 1)) problem = "a wrong result would pass";
    } catch (const std::exception& error) {
      problem = error.what();
    }
    failed += !problem.empty();
    std::printf("%-8s %-44s %5.2f of the allowed error, lse %5.2f, received %5.2f  %s\n",
                kernels.name, c.name, verdict.error, verdict.lse, verdict.received, problem.c_str());
  }
#if __has_include("../../csrc/linear.h")
  failed += run_linear(*kernels.linear, kernels.name);
#endif
  return failed;
}

}  // namespace
}  // namespace contract

int main(int argc, char** argv) {
  int failed = 0;
  for (const saccade::Kernels* const* k = saccade::usable_kernels(); *k; ++k) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= std::string(argv[i]) == (*k)->name;
    if (wanted) failed += contract::run_target(**k);
  }
  for (int i = 1; i < argc; ++i)
    if (!saccade::find_kernels(argv[i])) {
      std::printf("this machine has no SIMD target \"%s\"\n", argv[i]);
      ++failed;
    }
  std::printf("%s\n", failed ? "FAILED" : "every case is within the contract");
  return failed != 0;
}
