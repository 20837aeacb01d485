// Persistent workers, pinned to the CPUs of their NUMA nodes, that run one parallel region at a
// time. Knows nothing of experts.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "doorbell.h"
#include "topology.h"

namespace hybridk2 {

// How long a worker spins before it sleeps. For the next region, yielding its CPU to whoever needs
// it, a caller perhaps: between two layers lie some tens of microseconds, and 70 to 100 when a
// caller in Python submits one after the other (2-core Zen 5, 2026-11); a sleeping thread costs
// about 30 more to wake. At a barrier without yielding.
constexpr std::chrono::microseconds kSpin{200};

// Data that different cores write lies this far apart: two lines, as processors fetch them in
// pairs.
constexpr size_t kCacheLineBytes = 128;

class ThreadPool {
 public:
  // The caller of run() is the plan's first worker; the others are started. Each is pinned to the
  // CPUs that the plan gives it; they spin only when each has one of its own. spins_when_idle:
  // also for the next region; not where others compute on these CPUs between two, whose threads
  // spin as well. Throws std::system_error when there cannot be so many.
  explicit ThreadPool(const ThreadPlan& plan, bool spins_when_idle = true);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(places_.size()); }
  int nodes() const { return static_cast<int>(threads_of_node_.size()); }
  int threads_of_node(int node) const { return threads_of_node_[node]; }
  int node_of(int worker) const { return places_[worker].node; }
  // Workers that the system refused to pin; complete after a first region.
  int unpinned() const { return unpinned_.load(); }
  // How long a thread spins for the next region.
  std::chrono::microseconds idle_spin() const { return idle_spin_; }
  // For a thread that waits for the pool: it spins only when a CPU is left beside the workers'.
  std::chrono::microseconds waiter_spin() const { return waiter_spin_; }
  // Makes the calling thread worker 0: pins it. To be called once, by the thread that calls run().
  void adopt_this_thread();

  using Body = std::function<void(int phase, int worker)>;
  // Calls body(phase, worker) for every worker, phase after phase: no worker enters a phase before
  // all have left the previous one. Returns when all are done. After an exception the remaining
  // phases are skipped and it is thrown here. alone: on the calling thread only, as worker 0.
  void run(int num_phases, const Body& body, bool alone);

 private:
  void follow(int worker);
  void run_phases(int worker, int num_phases, const Body& body);
  void cross_barrier(int worker);
  void pin(int worker);
  void join();

  std::vector<WorkerPlace> places_;  // of each worker
  std::vector<int> threads_of_node_;
  std::chrono::microseconds idle_spin_;
  std::chrono::microseconds barrier_spin_;
  std::chrono::microseconds waiter_spin_;
  std::vector<std::thread> followers_;

  // The region: written before region_number_ grows, read after it was seen to have grown.
  const Body* body_ = nullptr;
  int num_phases_ = 0;
  std::atomic<uint64_t> region_number_{0};
  std::atomic<bool> stop_{false};
  Doorbell region_bell_;

  // Arrivals are counted on each node, then nodes: a line that every core of a machine writes in
  // turn would travel between the sockets with each of them.
  struct alignas(kCacheLineBytes) NodeArrivals {
    std::atomic<int> threads{0};
  };
  std::vector<NodeArrivals> arrived_;
  std::atomic<int> nodes_arrived_{0};
  std::atomic<uint64_t> barrier_number_{0};
  Doorbell barrier_bell_;

  std::atomic<bool> failed_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
  std::atomic<int> unpinned_{0};
};

}  // namespace hybridk2
