#include "workspace.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace saccade {
namespace {

constexpr int64_t kPage = 4096;

std::atomic<int64_t> total{0};

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;

  ~Buffer() { release(); }

  void release() {
    std::free(data);
    total.fetch_sub(size, std::memory_order_relaxed);
    data = nullptr;
    size = 0;
  }
};

thread_local Buffer buffers[2];

}  // namespace

int64_t workspace_size(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

int64_t workspace_bytes_of_thread() { return buffers[0].size + buffers[1].size; }

int64_t workspace_bytes_of_all() { return total.load(std::memory_order_relaxed); }

void* workspace(WorkspaceSlot slot, size_t bytes) {
  Buffer& buffer = buffers[(int)slot];
  const int64_t size = workspace_size((int64_t)bytes);
  if (buffer.size < size) {
    buffer.release();
    buffer.data = std::aligned_alloc(kPage, (size_t)size);
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = size;
    total.fetch_add(size, std::memory_order_relaxed);
  }
  return buffer.data;
}

}  // namespace saccade
