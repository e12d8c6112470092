// The forward pass: cuts a call into work items, runs them on the threads, combines split keys.
#pragma once
#include <algorithm>

#include "arena.h"
#include "decode.h"
#include "pool.h"
#include "prefill.h"

namespace saccade::SACCADE_TARGET {

// What all threads of a call share.
struct Call {
  const Problem* problem;
  WorkItem* items;
  Partials partials;
};

static void lay_out(Arena& arena, const Partition& sizes, Call& call) {
  const int64_t rows = sizes.partial_rows;
  call.items = arena.take<WorkItem>(sizes.items);
  call.partials.o = arena.take<float>(rows * call.problem->value_dim);
  call.partials.m = arena.take<float>(rows);
  call.partials.l = arena.take<float>(rows);
}

static int64_t call_bytes(const Problem& p, const Partition& sizes) {
  Arena measure(nullptr);
  Call call{&p, nullptr, {}};
  lay_out(measure, sizes, call);
  return measure.bytes();
}

// What `attend` allocates: the list of items, and a workspace for each thread that gets one.
static int64_t workspace_bytes(const Problem& p) {
  const Partition sizes = partition(p);
  int64_t largest = 0;
  each_block(p, sizes.block_rows, [&](const WorkItem& item) {
    const int64_t bytes = is_decode(p, item) ? Decode::workspace_bytes(p, item)
                                             : Prefill::workspace_bytes(p, item);
    largest = max(largest, bytes);
  });
  const int64_t threads = min(p.threads, sizes.items);
  return workspace_size(call_bytes(p, sizes)) + threads * workspace_size(largest);
}

static void run_item(void* context, int64_t i) {
  const Call& call = *(const Call*)context;
  const WorkItem& item = call.items[i];
  if (is_decode(*call.problem, item)) {
    Decode(*call.problem, call.partials).run(item);
  } else {
    Prefill(*call.problem, call.partials).run(item);
  }
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

static void attend(const Problem& p) {
  const Partition sizes = partition(p);
  Call call{&p, nullptr, {}};
  Arena arena(workspace(WorkspaceSlot::call, (size_t)call_bytes(p, sizes)));
  lay_out(arena, sizes, call);
  list_items(p, sizes, call.items);
  // The longest first, so that threads finish together.
  std::stable_sort(call.items, call.items + sizes.items,
                   [](const WorkItem& a, const WorkItem& b) { return a.cost > b.cost; });
  parallel_for(p.threads, sizes.items, run_item, &call);
  if (sizes.partial_rows > 0) parallel_for(p.threads, sizes.items, combine_item, &call);
}

}  // namespace saccade::SACCADE_TARGET
