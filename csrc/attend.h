// The forward pass: cuts a call into work items, runs them on the threads, combines split keys.
#pragma once
#include <algorithm>

#include "arena.h"
#include "decode.h"
#include "hadamard.h"
#include "pool.h"
#include "prefill.h"
#include "prefill_pairs.h"

namespace saccade::SACCADE_TARGET {

// What all threads of a call share.
struct Call {
  const Problem* problem;
  WorkItem* items;
  Partials partials;
  char* queries;  // transformed, where the problem says that they are to be
};

static void lay_out(Arena& arena, const Partition& sizes, Call& call) {
  const int64_t rows = sizes.partial_rows;
  call.items = arena.take<WorkItem>(sizes.items);
  call.partials.o = arena.take<float>(rows * call.problem->value_dim);
  call.partials.m = arena.take<float>(rows);
  call.partials.l = arena.take<float>(rows);
  call.partials.received = arena.take<int64_t>(received_count(*call.problem));
  if (call.problem->hadamard) call.queries = arena.take<char>(transformed_bytes(*call.problem));
}

static int64_t call_bytes(const Problem& p, const Partition& sizes) {
  Arena measure(nullptr);
  Call call{&p, nullptr, {}, nullptr};
  lay_out(measure, sizes, call);
  return measure.bytes();
}

// Memory of one work item.  Shapes alone decide, so that it is known before there are tensors.
static int64_t item_bytes(const Problem& p, const WorkItem& item) {
  if (is_decode(p, item)) return Decode::workspace_bytes(p, item);
#if defined(SACCADE_DOT)
  return max(Prefill::workspace_bytes(p, item), PrefillPairs<kMostParts>::workspace_bytes(p, item));
#else
  return Prefill::workspace_bytes(p, item);
#endif
}

// The call without its blocks.
static Problem without_blocks(const Problem& given) {
  Problem p = given;
  p.q_block = p.k_block = 0;
  p.blocks = {};
  return p;
}

// What `attend` allocates: the list of items, and a workspace for each thread that gets one.
static int64_t workspace_bytes(const Problem& p) {
  const Partition sizes = partition(p);
  int64_t largest = 0;
  each_block(p, sizes.block_rows,
             [&](const WorkItem& item) { largest = max(largest, item_bytes(p, item)); });
  const int64_t threads = min(p.threads, sizes.items);
  return workspace_size(call_bytes(p, sizes)) + threads * workspace_size(largest);
}

static void run_item(void* context, int64_t i) {
  const Call& call = *(const Call*)context;
  const Problem& p = *call.problem;
  const WorkItem& item = call.items[i];
  if (is_decode(p, item)) return Decode(p, call.partials).run(item);
  void* memory = workspace(WorkspaceSlot::item, (size_t)item_bytes(p, item));
#if defined(SACCADE_DOT)
  if (parts_of(p) == 1) return PrefillPairs<1>(p, call.partials).run(item, memory);
#endif
#if defined(SACCADE_AMX)
  if (parts_of(p) == 2) return PrefillPairs<2>(p, call.partials).run(item, memory);
#endif
  Prefill(p, call.partials).run(item, memory);
}

static void combine_item(void* context, int64_t i) {
  const Call& call = *(const Call*)context;
  const Problem& p = *call.problem;
  const WorkItem& item = call.items[i];
  if (item.splits == 1 || item.split != 0) return;
  const int64_t rows = item.num_rows();
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = item.row_begin + r;
    combine_row(p, p.sequences[item.sequence], call.partials, item.first_partial + r, rows,
                item.splits, row / p.group, item.head * p.group + row % p.group);
  }
}

// Multiply-adds for which another thread is not worth starting: about two microseconds' work.
constexpr int64_t kSmallWork = 1 << 16;

static int threads_for(const Problem& p, const WorkItem* items, int64_t count) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < count; ++i) pairs += items[i].cost;
  return pairs * (p.head_dim + p.value_dim) < kSmallWork ? 1 : p.threads;
}

static void attend(const Problem& given) {
  // A selection of all blocks is the same call, to the bit, as none.
  Problem p = has_blocks(given) && selects_all(given) ? without_blocks(given) : given;
  const Partition sizes = partition(p);
  Call call{&p, nullptr, {}, nullptr};
  Arena arena(workspace(WorkspaceSlot::call, (size_t)call_bytes(p, sizes)));
  lay_out(arena, sizes, call);
  list_items(p, sizes, call.items);
  // The longest first, so that threads finish together.
  std::stable_sort(call.items, call.items + sizes.items,
                   [](const WorkItem& a, const WorkItem& b) { return a.cost > b.cost; });
  if (p.hadamard) transform_queries(p, call.queries);
  if (p.received) std::memset(call.partials.received, 0, received_count(p) * sizeof(int64_t));
  parallel_for(threads_for(p, call.items, sizes.items), sizes.items, run_item, &call);
  if (sizes.partial_rows > 0) parallel_for(p.threads, sizes.items, combine_item, &call);
  if (p.received) finish_received(p, call.partials.received);
  if (p.hadamard) transform_outputs(p);
}

}  // namespace saccade::SACCADE_TARGET
