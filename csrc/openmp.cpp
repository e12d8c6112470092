#include "openmp.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <initializer_list>

namespace saccade {
namespace {

// How GCC's runtime starts a parallel region; LLVM's and Intel's have it under this name too.
using Start = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__SANITIZE_THREAD__)
constexpr bool kInstrumented = true;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
constexpr bool kInstrumented = true;
#else
constexpr bool kInstrumented = false;
#endif
#else
constexpr bool kInstrumented = false;
#endif

std::atomic<bool> forked{false};

// Looked up among what torch itself is linked to: a process may hold several OpenMP runtimes, and
// only torch's own has the threads that torch's operators leave spinning.
Start find_start() {
  if (kInstrumented) return nullptr;
  for (const char* name : {"libtorch_cpu.so", "libtorch_cpu.dylib"}) {
    void* torch = dlopen(name, RTLD_NOLOAD | RTLD_LAZY);
    if (!torch) continue;
    if (void* found = dlsym(torch, "GOMP_parallel")) {
      pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
      return (Start)found;
    }
  }
  return nullptr;
}

Start start() {
  static const Start found = find_start();
  return forked.load(std::memory_order_relaxed) ? nullptr : found;
}

}  // namespace

bool has_openmp() { return start() != nullptr; }

bool run_on_openmp(int threads, void (*fn)(void*), void* context) {
  const Start run = start();
  if (!run) return false;
  run(fn, context, (unsigned)threads, 0);
  return true;
}

}  // namespace saccade
