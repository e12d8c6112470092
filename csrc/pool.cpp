#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "openmp.h"

namespace saccade {
namespace {

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

struct Job {
  void (*fn)(void*, int64_t);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};

  void work() {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) fn(context, i);
    } catch (const std::bad_alloc&) {  // the only thing that kernels throw
      out_of_memory.store(true);
    }
  }
};

class Pool {
 public:
  // False when another caller owns the workers.
  bool try_run(int threads, Job& job) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    if (threads > job.count) threads = (int)job.count;
    while ((int)workers_.size() < threads - 1) start_worker();
    start(threads - 1, job);
    job.work();
    // Workers that have not woken yet can no longer enter; wait for those inside.
    open_.store(0);
    while (inside_.load() != 0) pause_briefly();
    return true;
  }

 private:
  // open_ packs the number of places left for workers; a worker takes one to enter a job.
  void start(int places, Job& job) {
    job_.store(&job);
    open_.store(places);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      generation_.fetch_add(1);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
  }

  void start_worker() {
    workers_.emplace_back([this] { serve(); });
    workers_.back().detach();  // workers live as long as the process
  }

  void serve() {
    uint64_t seen = generation_.load() - 1;
    for (;;) {
      seen = wait_for_work(seen);
      enter();
    }
  }

  void enter() {
    inside_.fetch_add(1);  // before taking a place, so that the owner never misses a worker
    int places = open_.load();
    while (places > 0 && !open_.compare_exchange_weak(places, places - 1)) {
    }
    if (places > 0) job_.load()->work();
    inside_.fetch_sub(1);
  }

  // Spins for a moment, because decoding calls follow each other closely, then sleeps.
  uint64_t wait_for_work(uint64_t seen) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(30);
    for (int i = 0;; ++i) {
      if (uint64_t now = generation_.load(); now != seen) return now;
      if (i % 64 == 63 && std::chrono::steady_clock::now() > deadline) break;
      pause_briefly();
    }
    std::unique_lock<std::mutex> lock(sleep_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return generation_.load() != seen; });
    sleeping_.fetch_sub(1);
    return generation_.load();
  }

  std::mutex owner_, sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::atomic<uint64_t> generation_{1};
  std::atomic<int> open_{0}, inside_{0}, sleeping_{0};
  std::atomic<Job*> job_{nullptr};
};

// Never destroyed: detached workers may outlive static destructors.
std::atomic<Pool*> the_pool{nullptr};

void forget_pool_in_child() { the_pool.store(new Pool); }  // its threads stayed in the parent

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool.store(new Pool);
    pthread_atfork(nullptr, nullptr, forget_pool_in_child);
  });
  return *the_pool.load();
}

std::atomic<bool> sharing{true};

using Clock = std::chrono::steady_clock;

// A region of torch's runtime ends when all of its threads have come, even those that find nothing
// left to do.  They come at once if they still spin, late if they sleep (the operators before ran
// on one thread) or if other programs want the cores: then calls leave them alone for a while,
// twice as long each time, and compute on threads that nobody has to wait for.
class Punctuality {
 public:
  bool expected() {
    if (left_out_ == 0) return true;
    --left_out_;
    return false;
  }

  void note(bool late) {
    if (late) left_out_ = next_;
    next_ = late ? std::min(2 * next_, kMost) : kFewest;
  }

 private:
  static constexpr int kFewest = 64, kMost = 4096;  // calls
  int left_out_ = 0, next_ = kFewest;
};

struct SharedJob {
  Job* job;
  pthread_t caller;
  Clock::time_point done{};  // when the caller found nothing left to do

  static void work(void* context) {
    auto* shared = (SharedJob*)context;
    shared->job->work();
    if (pthread_equal(pthread_self(), shared->caller)) shared->done = Clock::now();
  }
};

// On torch's threads.  The team always has its full size: GCC's runtime ends the threads that a
// smaller one leaves over, and starts them again for the next operator of torch.  False where there
// are none, they were late, or another caller is computing on them.
bool run_shared(int threads, Job& job) {
  static std::mutex busy;
  static Punctuality threads_of_torch;
  if (!sharing.load(std::memory_order_relaxed) || !has_openmp()) return false;
  std::unique_lock<std::mutex> owner(busy, std::try_to_lock);
  if (!owner.owns_lock() || !threads_of_torch.expected()) return false;
  SharedJob shared{&job, pthread_self()};
  const auto start = Clock::now();
  run_on_openmp(threads, SharedJob::work, &shared);
  const auto waited = Clock::now() - shared.done;
  threads_of_torch.note(waited > std::chrono::microseconds(50) && waited > shared.done - start);
  return true;
}

}  // namespace

void parallel_for(int threads, int64_t count, void (*fn)(void*, int64_t), void* context) {
  Job job{fn, context, count};
  if (threads <= 1 || count <= 1) {
    job.work();
  } else if (!run_shared(threads, job) && !pool().try_run(threads, job)) {
    job.work();
  }
  if (job.out_of_memory.load()) throw std::bad_alloc();
}

bool share_threads(bool on) {
  sharing.store(on);
  return on && has_openmp();
}

}  // namespace saccade
