#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>

namespace hybridk2 {
namespace {

bool pin_this_thread(const std::vector<int>& cpus) {
  const int end = *std::max_element(cpus.begin(), cpus.end()) + 1;
  cpu_set_t* mask = CPU_ALLOC(end);
  if (mask == nullptr) return false;
  const size_t mask_bytes = CPU_ALLOC_SIZE(end);
  CPU_ZERO_S(mask_bytes, mask);
  for (const int cpu : cpus) CPU_SET_S(cpu, mask_bytes, mask);
  const int error = pthread_setaffinity_np(pthread_self(), mask_bytes, mask);
  CPU_FREE(mask);
  return error == 0;
}

}  // namespace

ThreadPool::ThreadPool(const ThreadPlan& plan, bool spins_when_idle)
    : places_(plan.workers),
      threads_of_node_(plan.threads_of_node),
      idle_spin_(plan.a_cpu_each && spins_when_idle ? kSpin : kSpin.zero()),
      barrier_spin_(plan.a_cpu_each ? kSpin : kSpin.zero()),
      waiter_spin_(plan.cpus_to_spare ? kSpin : kSpin.zero()),
      arrived_(plan.nodes.size()) {
  try {
    for (int worker = 1; worker < threads(); ++worker) {
      followers_.emplace_back([this, worker] { follow(worker); });
    }
  } catch (...) {
    join();
    throw;
  }
}

ThreadPool::~ThreadPool() { join(); }

void ThreadPool::join() {
  stop_.store(true);
  region_bell_.ring();
  for (std::thread& follower : followers_) follower.join();
}

void ThreadPool::adopt_this_thread() { pin(0); }

// Failing costs speed, not correctness: a container may forbid it.
void ThreadPool::pin(int worker) {
  if (!pin_this_thread(places_[worker].cpus)) unpinned_.fetch_add(1);
}

// region_number_ grows by a sequentially consistent store after body_ and num_phases_ are written,
// and followers read them after loading the grown number: release and acquire. Nobody writes them
// again before the region's last barrier, which every follower crosses after its last use of them.
void ThreadPool::run(int num_phases, const Body& body, bool alone) {
  if (alone || threads() == 1) {
    for (int phase = 0; phase < num_phases; ++phase) body(phase, 0);
    return;
  }
  body_ = &body;
  num_phases_ = num_phases;
  failed_.store(false);
  region_number_.store(region_number_.load() + 1);
  region_bell_.ring();
  run_phases(0, num_phases, body);
  if (failed_.load()) {
    const std::exception_ptr error = error_;
    error_ = nullptr;
    std::rethrow_exception(error);
  }
}

void ThreadPool::follow(int worker) {
  pin(worker);
  uint64_t seen = 0;
  for (;;) {
    region_bell_.wait([&] { return region_number_.load() != seen || stop_.load(); }, idle_spin_);
    if (stop_.load()) return;
    seen = region_number_.load();
    run_phases(worker, num_phases_, *body_);
  }
}

// After a failure everybody still crosses every barrier, with nothing done in between: the region
// ends for all at its last barrier, and failed_ is not read behind it, where the next region clears
// it.
void ThreadPool::run_phases(int worker, int num_phases, const Body& body) {
  for (int phase = 0; phase < num_phases; ++phase) {
    try {
      if (!failed_.load()) body(phase, worker);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex_);
      if (error_ == nullptr) error_ = std::current_exception();
      failed_.store(true);
    }
    cross_barrier(worker);
  }
}

// The last of a node to arrive clears the node's count, the last of those clears the nodes' and
// lets everybody go by changing barrier_number_. A worker can arrive at the next barrier only after
// it has seen that change, hence after the counts were cleared. What a worker wrote before the
// barrier is released by its fetch_add and acquired through the last ones'; everybody else acquires
// it from barrier_number_.
void ThreadPool::cross_barrier(int worker) {
  const uint64_t number = barrier_number_.load();
  const int node = node_of(worker);
  std::atomic<int>& arrived = arrived_[node].threads;
  if (arrived.fetch_add(1) + 1 == threads_of_node_[node]) {
    arrived.store(0);
    if (nodes_arrived_.fetch_add(1) + 1 == nodes()) {
      nodes_arrived_.store(0);
      barrier_number_.store(number + 1);
      barrier_bell_.ring();
      return;
    }
  }
  // The others compute on CPUs of their own; nobody here waits for this one.
  barrier_bell_.wait([&] { return barrier_number_.load() != number; }, barrier_spin_,
                     Spinning::kKeepsCpu);
}

}  // namespace hybridk2
