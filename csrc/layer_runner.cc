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
#include "layer_runner.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <new>

#include "errors.h"

namespace hybridk2 {
namespace {

// A block of one expert's tokens is multiplied at once: with four strips, its sums (96 KB) and its
// slice of the activations (96 KB) stay in L2, and weights are decoded once for 8 tiles.
constexpr int64_t kTokensPerBlock = 8 * kTokensPerTile;
constexpr int64_t kMaxStripsPerItem = 4;
constexpr size_t kSumsBytes = sizeof(float) * kMaxStripsPerItem * kTokensPerBlock * kStripRows;
constexpr size_t kWorkerBytes = kSumsBytes + kScratchBytes;

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
  const uint8_t* layer_weights;
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
  int64_t gate_up_strips = 1;  // per item
  int64_t down_strips = 1;
  ItemQueue gather_items, gate_up_items, down_items, sum_items;

  const void* row(int64_t slot, int64_t hidden) const {
    return static_cast<const uint8_t*>(call.x) +
           routing.slots[slot].token * hidden * bytes_of(call.precision);
  }
};

LayerRunner::LayerRunner(const ExpertsShape& shape, const ExpertBytes& expert_bytes,
                         const KernelTable& kernels, ThreadPool& pool, bool huge_pages)
    : shape_(shape),
      expert_bytes_(expert_bytes),
      kernels_(kernels),
      pool_(pool),
      scratch_("the workers' scratch", kWorkerBytes * pool.threads(), huge_pages),
      inputs_("gathered activations", huge_pages),
      intermediates_("SwiGLU results", huge_pages),
      partials_("expert outputs", huge_pages) {}

LayerRunner::WorkerScratch LayerRunner::scratch(int worker) const {
  uint8_t* begin = scratch_.data() + kWorkerBytes * worker;
  return {reinterpret_cast<float*>(begin), begin + kSumsBytes};
}

const ActivationKernels& LayerRunner::kernels_for(Precision precision) const {
  return precision == Precision::kBf16 ? *kernels_.bf16 : *kernels_.fp32;
}

void LayerRunner::run(const LayerCall& call, const uint8_t* layer_weights) {
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
      run_pass(part, layer_weights);
    } catch (const std::bad_alloc&) {
      throw OutOfMemoryError("the routing of a layer", part.num_tokens * part.top_k * sizeof(Slot));
    }
  }
}

void LayerRunner::run_pass(const LayerCall& call, const uint8_t* layer_weights) {
  Pass pass;
  pass.call = call;
  pass.layer_weights = layer_weights;
  plan(pass);
  std::array<std::function<void(int)>, 4> phases;
  int num_phases = 0;
  if (!pass.rows_as_inputs) phases[num_phases++] = [&](int) { gather_inputs(pass); };
  phases[num_phases++] = [&](int worker) { gate_and_up(pass, worker); };
  if (pass.partial) {
    phases[num_phases++] = [&](int worker) { down_to_partials(pass, worker); };
    phases[num_phases++] = [&](int) { sum_partials(pass); };
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
  pass.alone = num_runs * expert_bytes_.total + multiplications / 8 < kAloneWork;
  const int threads = pass.alone ? 1 : pool_.threads();
  const int64_t gate_up = strips_of_gate_up(shape_), down = strips_of_down(shape_);
  pass.gate_up_strips = strips_per_item(gate_up * num_runs, threads);
  pass.down_strips = strips_per_item(pass.partial ? down * num_runs : down, threads);
  pass.gather_items.reset(num_runs, threads);
  pass.gate_up_items.reset(num_runs * ceil_div(gate_up, pass.gate_up_strips), threads);
  pass.down_items.reset((pass.partial ? num_runs : 1) * ceil_div(down, pass.down_strips), threads);
  pass.sum_items.reset(down, threads);
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

void LayerRunner::gate_and_up(Pass& pass, int worker) const {
  const WorkerScratch mine = scratch(worker);
  const int64_t strips = strips_of_gate_up(shape_);
  const int64_t items_per_run = ceil_div(strips, pass.gate_up_strips);
  const int64_t strip_bytes = blocks_of(shape_.hidden) * kStripBlockBytes;
  const int64_t padding = padded(shape_.intermediate) - shape_.intermediate;
  for (int64_t item, end; pass.gate_up_items.claim(&item, &end);) {
    for (; item < end; ++item) {
      const ExpertRun& run = pass.routing.runs[item / items_per_run];
      const int64_t first = item % items_per_run * pass.gate_up_strips;
      const int64_t count = std::min(pass.gate_up_strips, strips - first);
      const uint8_t* weights =
          pass.layer_weights + run.expert * expert_bytes_.total + first * strip_bytes;
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
        if (padding == 0 || first + count < strips) continue;
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

void LayerRunner::down_to_partials(Pass& pass, int worker) const {
  const WorkerScratch mine = scratch(worker);
  const int64_t strips = strips_of_down(shape_);
  const int64_t items_per_run = ceil_div(strips, pass.down_strips);
  const int64_t num_blocks = blocks_of(shape_.intermediate);
  for (int64_t item, end; pass.down_items.claim(&item, &end);) {
    for (; item < end; ++item) {
      const ExpertRun& run = pass.routing.runs[item / items_per_run];
      const int64_t first = item % items_per_run * pass.down_strips;
      const int64_t count = std::min(pass.down_strips, strips - first);
      const uint8_t* weights = pass.layer_weights + run.expert * expert_bytes_.total +
                               expert_bytes_.gate_up + first * num_blocks * kStripBlockBytes;
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

void LayerRunner::sum_partials(Pass& pass) const {
  const Routing& routing = pass.routing;
  for (int64_t strip, end; pass.sum_items.claim(&strip, &end);) {
    const int64_t first_row = strip * kStripRows;
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

void LayerRunner::down_to_output(Pass& pass, int worker) const {
  const WorkerScratch mine = scratch(worker);
  const int64_t strips = strips_of_down(shape_);
  const int64_t num_blocks = blocks_of(shape_.intermediate);
  for (int64_t item, end; pass.down_items.claim(&item, &end);) {
    for (; item < end; ++item) {
      const int64_t first = item * pass.down_strips;
      const int64_t count = std::min(pass.down_strips, strips - first);
      float* out = pass.call.out + first * kStripRows;
      for (int64_t token = 0; token < pass.call.num_tokens; ++token) {
        std::memset(out + token * shape_.hidden, 0, sizeof(float) * count * kStripRows);
      }
      const auto weights_of = [&](const ExpertRun& run) {
        return pass.layer_weights + run.expert * expert_bytes_.total + expert_bytes_.gate_up +
               first * num_blocks * kStripBlockBytes;
      };
      const std::vector<ExpertRun>& runs = pass.routing.runs;
      for (size_t r = 0; r < runs.size(); ++r) {
        const ExpertRun& run = runs[r];
        const uint8_t* weights = weights_of(run);
        const uint8_t* next_weights = r + 1 < runs.size() ? weights_of(runs[r + 1]) : nullptr;
        for (int64_t begin = 0; begin < run.num_tokens; begin += kTokensPerBlock) {
          const int64_t slot = run.first_slot + begin;
          const int64_t tokens = std::min(kTokensPerBlock, run.num_tokens - begin);
          pass.kernels->matmul({weights, count, num_blocks,
                                pass.intermediates + slot * pass.middle_elements, tokens, mine.sums,
                                mine.unpacked, next_weights});
          for (int64_t s = 0; s < count; ++s) {
            for (int64_t i = 0; i < tokens; ++i) {
              const Slot& to = pass.routing.slots[slot + i];
              add_weighted(mine.sums + (s * tokens + i) * kStripRows, to.weight, kStripRows,
                           out + to.token * shape_.hidden + s * kStripRows);
            }
          }
        }
      }
    }
  }
}

}  // namespace hybridk2
