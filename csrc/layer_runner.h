// One call: a layer's weighted sum over the experts of its tokens, by all threads of the pool, each
// with the weights of its own node. Knows the panels and the kernels, not who asks nor where
// weights come from.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "activations.h"
#include "arena.h"
#include "dispatch.h"
#include "routing.h"
#include "thread_pool.h"
#include "weights.h"

namespace hybridk2 {

// The tensors of a call; they stay alive and unmodified until it is done.
struct LayerCall {
  int64_t layer;
  int64_t num_tokens;
  int64_t top_k;
  const void* x;  // (num_tokens, hidden) in `precision`
  Precision precision;
  const int32_t* expert_ids;  // (num_tokens, top_k); -1: computed elsewhere
  const float* weights;       // (num_tokens, top_k)
  float* out;                 // (num_tokens, hidden)
};

// Work items [0, total), claimed in runs that shrink towards the end: long runs read memory as one
// stream, short ones end together. Claims order nothing: the pool's barriers do.
class ItemQueue {
 public:
  void reset(int64_t total, int threads);
  bool claim(int64_t* begin, int64_t* end);

 private:
  std::atomic<int64_t> next_{0};
  int64_t total_ = 0;
  int threads_ = 1;
};

class LayerRunner {
 public:
  LayerRunner(const Weights& weights, const KernelTable& kernels, ThreadPool& pool,
              const ThreadPlan& plan, bool huge_pages);

  // Only from the pool's worker 0. Throws OutOfMemoryError.
  void run(const LayerCall& call);

 private:
  struct Pass;
  struct WorkerScratch {
    float* sums;
    uint8_t* unpacked;
  };
  // What the threads of one node have to do in a pass: the strips that lie there.
  struct alignas(kCacheLineBytes) NodeWork {
    ItemQueue gate_up_items, down_items, sum_items;
    int64_t gate_up_strips = 1;  // per item
    int64_t down_strips = 1;
  };

  const ActivationKernels& kernels_for(Precision precision) const;
  void run_pass(const LayerCall& call);
  void plan(Pass& pass);
  void plan_node(const Pass& pass, int node);
  void gather_inputs(Pass& pass) const;
  void gate_and_up(Pass& pass, int worker);
  void down_to_partials(Pass& pass, int worker);
  void down_to_output(Pass& pass, int worker);
  void add_down(Pass& pass, int worker, int64_t first, int64_t end);
  void add_down_strips(Pass& pass, int worker, const ExpertRun& run, const uint8_t* strips,
                       int64_t count, const uint8_t* next, float* out);
  void sum_partials(Pass& pass, int worker);
  WorkerScratch scratch(int worker) const;

  const Weights& weights_;
  ExpertsShape shape_;
  KernelTable kernels_;
  ThreadPool& pool_;
  std::vector<std::unique_ptr<Arena>> scratch_;  // of each node's workers
  std::vector<int> first_worker_;                // of each node
  std::vector<NodeWork> work_;                   // of each node
  GrowingBuffer inputs_;                         // gathered activations of every slot
  GrowingBuffer intermediates_;                  // SwiGLU results of every slot
  GrowingBuffer partials_;                       // expert outputs of every slot, in small calls
};

}  // namespace hybridk2
