// Persistent workers, one per core, that run one parallel region at a time. Knows nothing of
// experts.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "doorbell.h"

namespace hybridk2 {

// How long a worker spins for the next region before it sleeps, yielding its CPU to whoever needs
// it. Between two layers lie some tens of microseconds, and 70 to 100 when a caller in Python
// submits one after the other (2-core Zen 5, 2026-11); a sleeping thread costs about 30 more to
// wake.
constexpr std::chrono::microseconds kSpin{200};

// One CPU per physical core that this thread may run on, in ascending order, then their siblings.
std::vector<int> usable_cpus();
// The number of physical cores among them.
int usable_cores();

class ThreadPool {
 public:
  // threads: workers, the caller of run() included, so threads - 1 are started. Each is pinned to a
  // CPU of its own when there are enough; otherwise none is pinned and none spins.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }
  std::chrono::microseconds spin() const { return spin_; }
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
  void cross_barrier();

  int threads_;
  std::vector<int> cpus_;  // empty: not pinned
  std::chrono::microseconds spin_;
  std::chrono::microseconds waiter_spin_;
  std::vector<std::thread> followers_;

  // The region: written before region_number_ grows, read after it was seen to have grown.
  const Body* body_ = nullptr;
  int num_phases_ = 0;
  std::atomic<uint64_t> region_number_{0};
  std::atomic<bool> stop_{false};
  Doorbell region_bell_;

  std::atomic<int> arrived_{0};
  std::atomic<uint64_t> barrier_number_{0};
  Doorbell barrier_bell_;

  std::atomic<bool> failed_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace hybridk2
