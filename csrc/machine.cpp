#include "machine.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>

#include "pool.h"

namespace saccade {
namespace {

constexpr int64_t kPart = 32 << 10;  // floats that one work item of `read_memory` reads

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Seconds of the fastest of nine runs.
template <class Run>
double best_of_nine(Run&& run) {
  double best = 1e30;
  for (int i = 0; i < 9; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    best = std::min(best, seconds_since(start));
  }
  return best;
}

struct Reading {
  const Kernels* kernels;
  const float* memory;
  int64_t size;  // floats of one work item
  volatile float sink;
};

void read_item(void* context, int64_t i) {
  auto* reading = (Reading*)context;
  reading->sink = reading->kernels->read_all(reading->memory + i * reading->size, reading->size);
}

// Operations a second of chains of products on all threads.
double best_rate(double (*flops)(int64_t), float (*chains)(int64_t), int64_t steps,
                 int64_t threads) {
  check_threads(threads);
  struct Context {
    float (*chains)(int64_t);
    int64_t steps;
    volatile float sink;
  } context{chains, steps, 0};
  const double best = best_of_nine([&] {
    parallel_for((int)threads, threads, [](void* c, int64_t) {
      auto* context = (Context*)c;
      context->sink = context->chains(context->steps);
    }, &context);
  });
  return flops(steps) * (double)threads / best;
}

}  // namespace

void check_threads(int64_t threads) {
  if (threads < 1 || threads > 4096) throw std::invalid_argument("threads must be 1 to 4096");
}

double measure_fma_peak(const Kernels& kernels, int64_t threads) {
  return best_rate(kernels.fma_flops, kernels.fma_chains, 4'000'000, threads);
}

double measure_pair_peak(const Kernels& kernels, int64_t threads) {
  if (kernels.pair_flops(1) == 0.0) return 0.0;
  // As long as the other: a step of matrix tiles does 85 times the work of one of registers.
  const int64_t steps = kernels.pair_flops(1) > 1e4 ? 100'000 : 4'000'000;
  return best_rate(kernels.pair_flops, kernels.pair_chains, steps, threads);
}

double measure_read_bandwidth(const Kernels& kernels, int64_t threads, int64_t megabytes) {
  check_threads(threads);
  if (megabytes < 1 || megabytes > 1 << 16)
    throw std::invalid_argument("megabytes must be 1 to 65536");
  const int64_t items = threads * 16, size = (megabytes << 20) / 4 / items / 1024 * 1024;
  const std::unique_ptr<float[]> memory(new float[items * size]);
  std::fill(memory.get(), memory.get() + items * size, 1.f);
  Reading reading{&kernels, memory.get(), size, 0};
  const double best =
      best_of_nine([&] { parallel_for((int)threads, items, read_item, &reading); });
  return 4.0 * (double)(items * size) / best;
}

void read_memory(const Kernels& kernels, const TensorArg& x, int64_t threads) {
  check_threads(threads);
  if (x.dtype != Dtype::f32 || x.ndim != 1 || x.shape[0] < kPart || x.stride[0] != 1)
    throw std::invalid_argument("read_through needs a contiguous float32 vector of 32768 or more");
  if (!x.data || (uintptr_t)x.data % sizeof(float) || x.shape[0] > x.reach / (int64_t)sizeof(float))
    throw std::invalid_argument("the vector is longer than its memory, or misaligned");
  Reading reading{&kernels, (const float*)x.data, kPart, 0};
  parallel_for((int)threads, x.shape[0] / kPart, read_item, &reading);
}

}  // namespace saccade
