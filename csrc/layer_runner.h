// One call: a layer's weighted sum over the experts of its tokens, by all threads of the pool.
// Knows the panels and the kernels, not who asks nor where weights come from.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "activations.h"
#include "arena.h"
#include "dispatch.h"
#include "panel.h"
#include "routing.h"
#include "thread_pool.h"

namespace hybridk2 {

struct ExpertsShape {
  int64_t num_layers;
  int64_t num_experts;
  int64_t hidden;        // multiple of 32
  int64_t intermediate;  // multiple of 32
};

// An expert is its gate and up strips (one for 16 rows of both), then its down strips (32 rows).
struct ExpertBytes {
  int64_t gate_up;
  int64_t total;
};

inline int64_t strips_of_gate_up(const ExpertsShape& shape) {
  return shape.intermediate / kPanelRows;
}
inline int64_t strips_of_down(const ExpertsShape& shape) { return shape.hidden / kStripRows; }

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
  LayerRunner(const ExpertsShape& shape, const ExpertBytes& expert_bytes,
              const KernelTable& kernels, ThreadPool& pool, bool huge_pages);

  // Runs a call whose experts lie at layer_weights, one after the other. Only from the pool's
  // worker 0. Throws OutOfMemoryError.
  void run(const LayerCall& call, const uint8_t* layer_weights);

 private:
  struct Pass;
  struct WorkerScratch {
    float* sums;
    uint8_t* unpacked;
  };

  const ActivationKernels& kernels_for(Precision precision) const;
  void run_pass(const LayerCall& call, const uint8_t* layer_weights);
  void plan(Pass& pass);
  void gather_inputs(Pass& pass) const;
  void gate_and_up(Pass& pass, int worker) const;
  void down_to_partials(Pass& pass, int worker) const;
  void down_to_output(Pass& pass, int worker) const;
  void sum_partials(Pass& pass) const;
  WorkerScratch scratch(int worker) const;

  ExpertsShape shape_;
  ExpertBytes expert_bytes_;
  KernelTable kernels_;
  ThreadPool& pool_;
  Arena scratch_;
  GrowingBuffer inputs_;         // gathered activations of every slot
  GrowingBuffer intermediates_;  // SwiGLU results of every slot
  GrowingBuffer partials_;       // expert outputs of every slot, in small calls
};

}  // namespace hybridk2
