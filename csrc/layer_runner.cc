// A pass has up to four phases, a barrier after each:
//
// gather: tokens of one expert side by side, as kernels read them; skipped where rows serve as are.
//
// gate/up: every strip of every active expert: SwiGLU of its 16 columns.
//
// down: in small calls every strip of every active expert, into that slot's partial output; in
// large calls every strip of the output, all experts added in ascending id.
//
// sum: in small calls only: every token's partial outputs, in ascending expert id.
//
// Both forms of down add the same numbers in the same order, so they agree bit for bit.
//
// Every node has its own strips (weights.h) and its own queues of them, from which only its threads
// take; activations are shared, and so is the work of gathering them. A node's rows of the output
// are summed where their partial outputs were written.
#include "layer_runner.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <new>

#include "errors.h"

namespace hybridk2 {
namespace {

// A block of one expert's tokens is multiplied at once: with four strips, its sums (144 KB) and its
// slice of the activations (144 KB) stay in L2, and weights are decoded once for 12 tiles.
constexpr int64_t kTokensPerBlock = 12 * kTokensPerTile;
constexpr int64_t kMaxStripsPerItem = 4;
constexpr size_t kSumsBytes = sizeof(float) * kMaxStripsPerItem * kTokensPerBlock * kStripRows;
constexpr size_t kWorkerBytes = kSumsBytes + kScratchBytes;

// Large calls compute so many items of down's strips for one expert before they go on to the next,
// so that its activations come from DRAM or L3 once and not with each item: 1024 tokens of K2 have
// 34 MB of them. 1, 4 and 14 items, two threads of a 2-core Zen 5 (2026-11): 834, 799, 809 ms.
constexpr int64_t kDownItemsAtOnce = 4;

// Calls of at most this many slots write every expert's output and sum in a phase of its own:
// single strips of single experts split evenly over any number of threads. Larger calls have work
// enough in every strip of the output, and add in place. 256 outputs of K2 are 7 MB.
constexpr int64_t kMaxPartialSlots = 256;

// Memory for the activations of one pass; a larger call is cut into passes.
constexpr int64_t kPassBytes = int64_t{256} << 20;

// Below this much work (bytes of weights, plus one for every 8 multiplications) one thread is done
// before a second has woken up.
constexpr int64_t kAloneWork = 256 * 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t padded(int64_t columns) { return blocks_of(columns) * kBlockColumns; }

// As many strips as leave every thread eight items, within what scratch holds.
int64_t strips_per_item(int64_t strips, int threads) {
  return std::clamp<int64_t>(strips / (8 * threads), 1, kMaxStripsPerItem);
}

}  // namespace

void ItemQueue::reset(int64_t total, int threads) {
  next_.store(0);
  total_ = total;
  threads_ = threads;
}

bool ItemQueue::claim(int64_t* begin, int64_t* end) {
  int64_t next = next_.load(std::memory_order_relaxed);
  int64_t count;
  do {
    if (next >= total_) return false;
    count = std::max<int64_t>(1, (total_ - next) / (2 * threads_));
  } while (!next_.compare_exchange_weak(next, next + count, std::memory_order_relaxed));
  *begin = next;
  *end = next + count;
  return true;
}

// What the workers share while they run one pass; written by worker 0 before the region.
struct LayerRunner::Pass {
  LayerCall call;  // this pass's tokens only
  const ActivationKernels* kernels;
  Routing routing;
  bool rows_as_inputs =
      false;  // every expert has one token, whose row is already what kernels read
  bool alone = false;
  bool partial = false;
  uint32_t* inputs = nullptr;
  uint32_t* intermediates = nullptr;
  float* partials = nullptr;
  int64_t input_elements = 0;  // of one slot: hidden or intermediate, padded to whole blocks
  int64_t middle_elements = 0;
  ItemQueue gather_items;

  const void* row(int64_t slot, int64_t hidden) const {
    return static_cast<const uint8_t*>(call.x) +
           routing.slots[slot].token * hidden * bytes_of(call.precision);
  }
};

LayerRunner::LayerRunner(const Weights& weights, const KernelTable& kernels, ThreadPool& pool,
                         const ThreadPlan& plan, bool huge_pages)
    : weights_(weights),
      shape_(weights.shape()),
      kernels_(kernels),
      pool_(pool),
      work_(plan.nodes.size()),
      inputs_("gathered activations", huge_pages),
      intermediates_("SwiGLU results", huge_pages),
      partials_("expert outputs", huge_pages) {
  int first_worker = 0;
  for (size_t node = 0; node < plan.nodes.size(); ++node) {
    const int threads = plan.threads_of_node[node];
    scratch_.push_back(std::make_unique<Arena>("the workers' scratch", kWorkerBytes * threads,
                                               huge_pages, plan.nodes[node].number));
    first_worker_.push_back(first_worker);
    first_worker += threads;
  }
}

LayerRunner::WorkerScratch LayerRunner::scratch(int worker) const {
  const int node = pool_.node_of(worker);
  uint8_t* begin = scratch_[node]->data() + kWorkerBytes * (worker - first_worker_[node]);
  return {reinterpret_cast<float*>(begin), begin + kSumsBytes};
}

const ActivationKernels& LayerRunner::kernels_for(Precision precision) const {
  return precision == Precision::kBf16 ? *kernels_.bf16 : *kernels_.fp32;
}

void LayerRunner::run(const LayerCall& call) {
  const int columns_per_element = kernels_for(call.precision).columns_per_element;
  const int64_t slot_bytes = sizeof(uint32_t) *
                             (padded(shape_.hidden) + padded(shape_.intermediate)) /
                             columns_per_element;
  const int64_t most_tokens =
      std::max<int64_t>(1, kPassBytes / (slot_bytes * std::max<int64_t>(1, call.top_k)));
  // Passes of equal size: every one of them reads and decodes the weights.
  const int64_t passes = std::max<int64_t>(1, ceil_div(call.num_tokens, most_tokens));
  const int64_t pass_tokens = ceil_div(call.num_tokens, passes);
  for (int64_t begin = 0; begin < call.num_tokens; begin += pass_tokens) {
    LayerCall part = call;
    part.num_tokens = std::min(pass_tokens, call.num_tokens - begin);
    part.x = static_cast<const uint8_t*>(call.x) + begin * shape_.hidden * bytes_of(call.precision);
    part.expert_ids += begin * call.top_k;
    part.weights += begin * call.top_k;
    part.out += begin * shape_.hidden;
    try {
      run_pass(part);
    } catch (const std::bad_alloc&) {
      throw OutOfMemoryError("the routing of a layer", part.num_tokens * part.top_k * sizeof(Slot));
    }
  }
}

void LayerRunner::run_pass(const LayerCall& call) {
  Pass pass;
  pass.call = call;
  plan(pass);
  std::array<std::function<void(int)>, 4> phases;
  int num_phases = 0;
  if (!pass.rows_as_inputs) phases[num_phases++] = [&](int) { gather_inputs(pass); };
  phases[num_phases++] = [&](int worker) { gate_and_up(pass, worker); };
  if (pass.partial) {
    phases[num_phases++] = [&](int worker) { down_to_partials(pass, worker); };
    phases[num_phases++] = [&](int worker) { sum_partials(pass, worker); };
  } else {
    phases[num_phases++] = [&](int worker) { down_to_output(pass, worker); };
  }
  pool_.run(num_phases, [&](int phase, int worker) { phases[phase](worker); }, pass.alone);
}

void LayerRunner::plan(Pass& pass) {
  const LayerCall& call = pass.call;
  pass.kernels = &kernels_for(call.precision);
  pass.routing =
      route(call.expert_ids, call.weights, call.num_tokens, call.top_k, shape_.num_experts);
  const int64_t num_slots = static_cast<int64_t>(pass.routing.slots.size());
  const int64_t num_runs = static_cast<int64_t>(pass.routing.runs.size());
  const int columns_per_element = pass.kernels->columns_per_element;
  pass.input_elements = padded(shape_.hidden) / columns_per_element;
  pass.middle_elements = padded(shape_.intermediate) / columns_per_element;

  const bool rows_fit = padded(shape_.hidden) == shape_.hidden &&
                        bytes_of(call.precision) * columns_per_element == sizeof(uint32_t) &&
                        reinterpret_cast<uintptr_t>(call.x) % sizeof(uint32_t) == 0;
  pass.rows_as_inputs = rows_fit && num_runs == num_slots;
  pass.partial = num_slots <= kMaxPartialSlots;
  if (!pass.rows_as_inputs) {
    pass.inputs = reinterpret_cast<uint32_t*>(
        inputs_.reserve(sizeof(uint32_t) * num_slots * pass.input_elements));
  }
  pass.intermediates = reinterpret_cast<uint32_t*>(
      intermediates_.reserve(sizeof(uint32_t) * num_slots * pass.middle_elements));
  if (pass.partial) {
    pass.partials =
        reinterpret_cast<float*>(partials_.reserve(sizeof(float) * num_slots * shape_.hidden));
  }

  const int64_t multiplications = num_slots * 3 * shape_.hidden * shape_.intermediate;
  // On several nodes nobody is alone: each has weights that the others must not read.
  pass.alone =
      pool_.nodes() == 1 && num_runs * weights_.slice(0).bytes + multiplications / 8 < kAloneWork;
  pass.gather_items.reset(num_runs, pass.alone ? 1 : pool_.threads());
  for (int node = 0; node < pool_.nodes(); ++node) plan_node(pass, node);
}

void LayerRunner::plan_node(const Pass& pass, int node) {
  NodeWork& work = work_[node];
  const ExpertSlice& slice = weights_.slice(node);
  const int64_t num_runs = static_cast<int64_t>(pass.routing.runs.size());
  const int64_t down_runs = pass.partial ? num_runs : 1;
  const int threads = pass.alone ? 1 : pool_.threads_of_node(node);
  work.gate_up_strips = strips_per_item(slice.gate_up.count * num_runs, threads);
  work.down_strips = strips_per_item(slice.down.count * down_runs, threads);
  work.gate_up_items.reset(num_runs * ceil_div(slice.gate_up.count, work.gate_up_strips), threads);
  work.down_items.reset(down_runs * ceil_div(slice.down.count, work.down_strips), threads);
  work.sum_items.reset(slice.down.count, threads);
}

void LayerRunner::gather_inputs(Pass& pass) const {
  for (int64_t item, end; pass.gather_items.claim(&item, &end);) {
    for (; item < end; ++item) {
      const ExpertRun& run = pass.routing.runs[item];
      const int64_t tile_tokens = pass.kernels->tokens_per_tile;
      for (int64_t begin = 0; begin < run.num_tokens; begin += tile_tokens) {
        const int64_t first_slot = run.first_slot + begin;
        const int tokens = static_cast<int>(std::min(tile_tokens, run.num_tokens - begin));
        const void* rows[kTokensPerTile];
        for (int i = 0; i < tokens; ++i) rows[i] = pass.row(first_slot + i, shape_.hidden);
        pack_tile(rows, tokens, pass.call.precision, shape_.hidden, padded(shape_.hidden),
                  pass.kernels->columns_per_element,
                  pass.inputs + first_slot * pass.input_elements);
      }
    }
  }
}

void LayerRunner::gate_and_up(Pass& pass, int worker) {
  const WorkerScratch mine = scratch(worker);
  const int node = pool_.node_of(worker);
  NodeWork& work = work_[node];
  const StripRange strips = weights_.slice(node).gate_up;
  const int64_t items_per_run = ceil_div(strips.count, work.gate_up_strips);
  const int64_t strip_bytes = blocks_of(shape_.hidden) * kStripBlockBytes;
  const int64_t padding = padded(shape_.intermediate) - shape_.intermediate;
  for (int64_t item, end; work.gate_up_items.claim(&item, &end);) {
    for (; item < end; ++item) {
      const ExpertRun& run = pass.routing.runs[item / items_per_run];
      const int64_t in_slice = item % items_per_run * work.gate_up_strips;
      const int64_t count = std::min(work.gate_up_strips, strips.count - in_slice);
      const int64_t first = strips.first + in_slice;
      const uint8_t* weights =
          weights_.gate_up(node, pass.call.layer, run.expert) + in_slice * strip_bytes;
      for (int64_t begin = 0; begin < run.num_tokens; begin += kTokensPerBlock) {
        const int64_t slot = run.first_slot + begin;
        const int64_t tokens = std::min(kTokensPerBlock, run.num_tokens - begin);
        const void* inputs = pass.rows_as_inputs ? pass.row(slot, shape_.hidden)
                                                 : pass.inputs + slot * pass.input_elements;
        uint32_t* outputs = pass.intermediates + slot * pass.middle_elements;
        pass.kernels->matmul(
            {weights, count, blocks_of(shape_.hidden), inputs, tokens, mine.sums, mine.unpacked});
        for (int64_t s = 0; s < count; ++s) {
          pass.kernels->swiglu({mine.sums + s * tokens * kStripRows, tokens,
                                (first + s) * kPanelRows, padded(shape_.intermediate),
                                pass.call.precision == Precision::kBf16, outputs});
        }
        if (padding == 0 || first + count < strips_of_gate_up(shape_)) continue;
        const int64_t elements = shape_.intermediate / pass.kernels->columns_per_element;
        const int64_t tile_tokens = pass.kernels->tokens_per_tile;
        for (int64_t tile = 0; tile < tokens; tile += tile_tokens) {
          const int64_t width = std::min(tile_tokens, tokens - tile);
          std::memset(outputs + tile * pass.middle_elements + elements * width, 0,
                      sizeof(uint32_t) * (pass.middle_elements - elements) * width);
        }
      }
    }
  }
}

void LayerRunner::down_to_partials(Pass& pass, int worker) {
  const WorkerScratch mine = scratch(worker);
  const int node = pool_.node_of(worker);
  NodeWork& work = work_[node];
  const StripRange strips = weights_.slice(node).down;
  const int64_t items_per_run = ceil_div(strips.count, work.down_strips);
  const int64_t num_blocks = blocks_of(shape_.intermediate);
  const int64_t strip_bytes = num_blocks * kStripBlockBytes;
  for (int64_t item, end; work.down_items.claim(&item, &end);) {
    for (; item < end; ++item) {
      const ExpertRun& run = pass.routing.runs[item / items_per_run];
      const int64_t in_slice = item % items_per_run * work.down_strips;
      const int64_t count = std::min(work.down_strips, strips.count - in_slice);
      const int64_t first = strips.first + in_slice;
      const uint8_t* weights =
          weights_.down(node, pass.call.layer, run.expert) + in_slice * strip_bytes;
      for (int64_t begin = 0; begin < run.num_tokens; begin += kTokensPerBlock) {
        const int64_t slot = run.first_slot + begin;
        const int64_t tokens = std::min(kTokensPerBlock, run.num_tokens - begin);
        pass.kernels->matmul({weights, count, num_blocks,
                              pass.intermediates + slot * pass.middle_elements, tokens, mine.sums,
                              mine.unpacked});
        for (int64_t s = 0; s < count; ++s) {
          for (int64_t i = 0; i < tokens; ++i) {
            std::memcpy(pass.partials + (slot + i) * shape_.hidden + (first + s) * kStripRows,
                        mine.sums + (s * tokens + i) * kStripRows, sizeof(float) * kStripRows);
          }
        }
      }
    }
  }
}

void LayerRunner::sum_partials(Pass& pass, int worker) {
  const Routing& routing = pass.routing;
  const int node = pool_.node_of(worker);
  const int64_t first_strip = weights_.slice(node).down.first;
  for (int64_t strip, end; work_[node].sum_items.claim(&strip, &end);) {
    const int64_t first_row = (first_strip + strip) * kStripRows;
    const int64_t num_rows = (end - strip) * kStripRows;
    for (int64_t token = 0; token < pass.call.num_tokens; ++token) {
      float* out = pass.call.out + token * shape_.hidden + first_row;
      std::memset(out, 0, sizeof(float) * num_rows);
      for (int64_t at = routing.token_begin[token]; at < routing.token_begin[token + 1]; ++at) {
        const int64_t slot = routing.slots_of_tokens[at];
        add_weighted(pass.partials + slot * shape_.hidden + first_row, routing.slots[slot].weight,
                     num_rows, out);
      }
    }
  }
}

void LayerRunner::down_to_output(Pass& pass, int worker) {
  NodeWork& work = work_[pool_.node_of(worker)];
  const int64_t total = weights_.slice(pool_.node_of(worker)).down.count;
  for (int64_t item, end; work.down_items.claim(&item, &end);) {
    for (int64_t last; item < end; item = last) {
      last = std::min(item + kDownItemsAtOnce, end);
      add_down(pass, worker, item * work.down_strips, std::min(last * work.down_strips, total));
    }
  }
}

// Strips [first, end) of the node's part of down, all of them for one expert, then for the next.
void LayerRunner::add_down(Pass& pass, int worker, int64_t first, int64_t end) {
  const int node = pool_.node_of(worker);
  const int64_t num_blocks = blocks_of(shape_.intermediate);
  const int64_t strip_bytes = num_blocks * kStripBlockBytes;
  float* out = pass.call.out + weights_.slice(node).down.first * kStripRows;
  for (int64_t token = 0; token < pass.call.num_tokens; ++token) {
    std::memset(out + token * shape_.hidden + first * kStripRows, 0,
                (end - first) * sizeof(float) * kStripRows);
  }
  const std::vector<ExpertRun>& runs = pass.routing.runs;
  const auto strip_of = [&](size_t run, int64_t strip) {
    return weights_.down(node, pass.call.layer, runs[run].expert) + strip * strip_bytes;
  };
  for (size_t r = 0; r < runs.size(); ++r) {
    for (int64_t strip = first; strip < end; strip += work_[node].down_strips) {
      const int64_t count = std::min(work_[node].down_strips, end - strip);
      const bool expert_ends = strip + count == end && r + 1 < runs.size();
      const uint8_t* next = expert_ends ? strip_of(r + 1, first) : nullptr;
      add_down_strips(pass, worker, runs[r], strip_of(r, strip), count, next,
                      out + strip * kStripRows);
    }
  }
}

// count strips of one expert, whose rows begin at out. next: the strips that come then, where they
// are another expert's.
void LayerRunner::add_down_strips(Pass& pass, int worker, const ExpertRun& run,
                                  const uint8_t* strips, int64_t count, const uint8_t* next,
                                  float* out) {
  const WorkerScratch mine = scratch(worker);
  for (int64_t begin = 0; begin < run.num_tokens; begin += kTokensPerBlock) {
    const int64_t slot = run.first_slot + begin;
    const int64_t tokens = std::min(kTokensPerBlock, run.num_tokens - begin);
    const uint32_t* inputs = pass.intermediates + slot * pass.middle_elements;
    const void* next_inputs = next == nullptr ? nullptr : inputs + tokens * pass.middle_elements;
    pass.kernels->matmul({strips, count, blocks_of(shape_.intermediate), inputs, tokens, mine.sums,
                          mine.unpacked, next, next_inputs});
    for (int64_t i = 0; i < tokens; ++i) {
      const Slot& to = pass.routing.slots[slot + i];
      for (int64_t s = 0; s < count; ++s) {
        add_weighted(mine.sums + (s * tokens + i) * kStripRows, to.weight, kStripRows,
                     out + to.token * shape_.hidden + s * kStripRows);
      }
    }
  }
}

}  // namespace hybridk2
