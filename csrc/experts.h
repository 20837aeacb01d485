// The routed experts of all MoE layers in host memory: their weights, and the queue of calls to
// them. Knows nothing of Python, of checkpoints' files, or of other places that compute experts.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "arena.h"
#include "dispatch.h"
#include "job_queue.h"
#include "layer_runner.h"
#include "panel.h"
#include "thread_pool.h"

namespace hybridk2 {

struct ExpertMatrices {
  PackedMatrix gate;  // (intermediate, hidden)
  PackedMatrix up;    // (intermediate, hidden)
  PackedMatrix down;  // (hidden, intermediate)
};

class Experts {
 public:
  // isa: "" for HYBRIDK2_ISA or the fastest. threads: 0 for one per usable core. Throws
  // std::invalid_argument, ConfigurationError, OutOfMemoryError.
  Experts(const ExpertsShape& shape, const std::string& isa, int threads, bool huge_pages);

  const char* isa() const { return kernels_.isa; }
  int threads() const { return pool_.threads(); }
  bool huge_pages() const { return weights_.huge_pages(); }
  int64_t weight_bytes() const { return static_cast<int64_t>(weights_.bytes()); }
  const ExpertsShape& shape() const { return shape_; }
  // False in a child of fork(), which has none of the threads.
  bool belongs_to_this_process() const;

  // Repacks one expert. Any thread, different experts at the same time; each expert once.
  void load(int64_t layer, int64_t expert, const ExpertMatrices& matrices);

  // The weights as the panels hold them, dequantised: gate and up (intermediate, hidden), down
  // (hidden, intermediate).
  void dequantise(int64_t layer, int64_t expert, float* gate, float* up, float* down) const;

  // Checks the call and starts it. out[t] = sum over t's experts, in ascending id, of
  // weight * down(silu(gate x) * up x).
  Ticket submit(const LayerCall& call);

  // Reads all weights once with every thread, by read loop `loop` (read_roof.h), and returns the
  // seconds it took: what a decode step could reach at best.
  double read_weights_seconds(int loop);

  // FLOP/s of all threads that do nothing but multiply, with the very instruction of the kernels
  // for this precision: what a large call could reach at best. 0 when those kernels have no such
  // loop.
  double arithmetic_roof(Precision precision);

 private:
  void check_location(int64_t layer, int64_t expert) const;
  void check_call(const LayerCall& call) const;
  uint8_t* expert_data(int64_t layer, int64_t expert) const;
  std::atomic<uint8_t>& load_state(int64_t layer, int64_t expert) const;

  ExpertsShape shape_;
  KernelTable kernels_;
  ExpertBytes expert_bytes_;
  pid_t process_;
  Arena weights_;
  std::unique_ptr<std::atomic<uint8_t>[]> load_states_;
  ThreadPool pool_;
  LayerRunner runner_;
  JobQueue queue_;  // last: its thread uses all of the above until it is joined
};

}  // namespace hybridk2
