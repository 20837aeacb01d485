// The routed experts of all MoE layers in host memory: their weights, and the queue of calls to
// them. Knows nothing of Python, of checkpoints' files, or of other places that compute experts.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "dispatch.h"
#include "job_queue.h"
#include "layer_runner.h"
#include "thread_pool.h"
#include "topology.h"
#include "weights.h"

namespace hybridk2 {

class Experts {
 public:
  // isa: "" for HYBRIDK2_ISA or the fastest. threads: 0 for one per usable core. nodes: each holds
  // and computes a slice of every expert. elsewhere: for each expert of each layer, whether another
  // place keeps and computes it; empty: none is. spins_when_idle: see ThreadPool. Throws
  // std::invalid_argument, ConfigurationError, OutOfMemoryError.
  Experts(const ExpertsShape& shape, const std::string& isa, int threads, bool huge_pages,
          const std::vector<Node>& nodes = usable_nodes(), const std::vector<bool>& elsewhere = {},
          bool spins_when_idle = true);

  const ExpertsShape& shape() const { return weights_.shape(); }
  const char* isa() const { return kernels_.isa; }
  int threads() const { return pool_.threads(); }
  const std::vector<int>& threads_of_node() const { return plan_.threads_of_node; }
  bool huge_pages() const { return weights_.arena(0).huge_pages(); }
  // Of the weights' memory.
  int gigabyte_pages() const;
  int64_t weight_bytes() const { return weights_.bytes(); }
  // What was wanted and not had, though everything works: a line each.
  std::vector<std::string> troubles() const;
  // False in a child of fork(), which has none of the threads.
  bool belongs_to_this_process() const;

  // Repacks one expert: on one node the calling thread does it, on several the workers, each a part
  // of what its node will read. Any thread, different experts at the same time; each expert once.
  void load(int64_t layer, int64_t expert, const ExpertMatrices& matrices);

  // Where a loaded expert lies, as long as this object lives.
  std::vector<ExpertRegion> regions(int64_t layer, int64_t expert) const;

  // The weights as the panels hold them, dequantised: gate and up (intermediate, hidden), down
  // (hidden, intermediate).
  void dequantise(int64_t layer, int64_t expert, float* gate, float* up, float* down) const;

  // Checks the call and starts it. out[t] = sum over t's experts, in ascending id, of
  // weight * down(silu(gate x) * up x).
  Ticket submit(const LayerCall& call);

  // For those who bring calls from elsewhere than a caller: a job for the queue's thread, and, only
  // within such a job, a call that is checked and computed there. What either throws is the job's.
  Ticket enqueue(std::function<void()> job);
  void compute(const LayerCall& call);

  // Reads all weights once with every thread, by read loop `loop` (read_roof.h), and returns the
  // seconds it took: what a decode step could reach at best.
  double read_weights_seconds(int loop);

  // FLOP/s of all threads that do nothing but multiply, with the very instruction of the kernels
  // for this precision: what a large call could reach at best. 0 when those kernels have no such
  // loop.
  double arithmetic_roof(Precision precision);

 private:
  void check_process() const;
  void check_location(int64_t layer, int64_t expert) const;
  void check_loaded(int64_t layer, int64_t expert) const;
  void check_call(const LayerCall& call) const;
  void try_gigabyte_pages();
  void pack_on_nodes(int64_t layer, int64_t expert, const ExpertMatrices& matrices);
  std::atomic<uint8_t>& load_state(int64_t layer, int64_t expert) const;

  KernelTable kernels_;
  ThreadPlan plan_;
  pid_t process_;
  Weights weights_;
  std::unique_ptr<std::atomic<uint8_t>[]> load_states_;
  ThreadPool pool_;
  LayerRunner runner_;
  JobQueue queue_;  // last: its thread uses all of the above until it is joined
};

}  // namespace hybridk2
