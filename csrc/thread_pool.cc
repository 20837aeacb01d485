#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <fstream>
#include <new>
#include <set>
#include <string>

namespace hybridk2 {
namespace {

// The CPU and its hyper-threads, as the kernel writes them ("0,64"); its own number when unknown.
std::string core_of(int cpu) {
  std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                     "/topology/thread_siblings_list");
  std::string siblings;
  return std::getline(file, siblings) ? siblings : std::to_string(cpu);
}

struct Cpus {
  std::vector<int> first_of_core;
  std::vector<int> siblings;
};

Cpus allowed_cpus() {
  Cpus cpus;
  // Room for 8192 CPUs: a smaller mask makes the call fail on a machine with more.
  constexpr int kMaxCpus = 8192;
  cpu_set_t* mask = CPU_ALLOC(kMaxCpus);
  if (mask == nullptr) throw std::bad_alloc();
  const size_t mask_bytes = CPU_ALLOC_SIZE(kMaxCpus);
  CPU_ZERO_S(mask_bytes, mask);
  if (sched_getaffinity(0, mask_bytes, mask) == 0) {
    std::set<std::string> cores;
    for (int cpu = 0; cpu < kMaxCpus; ++cpu) {
      if (!CPU_ISSET_S(cpu, mask_bytes, mask)) continue;
      (cores.insert(core_of(cpu)).second ? cpus.first_of_core : cpus.siblings).push_back(cpu);
    }
  }
  CPU_FREE(mask);
  if (cpus.first_of_core.empty()) cpus.first_of_core.push_back(0);
  return cpus;
}

// Failing to pin costs speed, not correctness: a container may forbid it.
void pin_this_thread(int cpu) {
  cpu_set_t* mask = CPU_ALLOC(cpu + 1);
  if (mask == nullptr) return;
  const size_t mask_bytes = CPU_ALLOC_SIZE(cpu + 1);
  CPU_ZERO_S(mask_bytes, mask);
  CPU_SET_S(cpu, mask_bytes, mask);
  pthread_setaffinity_np(pthread_self(), mask_bytes, mask);
  CPU_FREE(mask);
}

}  // namespace

std::vector<int> usable_cpus() {
  Cpus cpus = allowed_cpus();
  cpus.first_of_core.insert(cpus.first_of_core.end(), cpus.siblings.begin(), cpus.siblings.end());
  return cpus.first_of_core;
}

int usable_cores() { return static_cast<int>(allowed_cpus().first_of_core.size()); }

ThreadPool::ThreadPool(int threads) : threads_(threads), cpus_(usable_cpus()) {
  constexpr std::chrono::microseconds kNoSpin{0};
  const int num_cpus = static_cast<int>(cpus_.size());
  const bool a_cpu_each = threads <= num_cpus;
  spin_ = a_cpu_each ? kSpin : kNoSpin;
  waiter_spin_ = threads < num_cpus ? kSpin : kNoSpin;
  if (!a_cpu_each) cpus_.clear();
  try {
    for (int worker = 1; worker < threads; ++worker) {
      followers_.emplace_back([this, worker] { follow(worker); });
    }
  } catch (...) {
    stop_.store(true);
    region_bell_.ring();
    for (std::thread& follower : followers_) follower.join();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  region_bell_.ring();
  for (std::thread& follower : followers_) follower.join();
}

void ThreadPool::adopt_this_thread() {
  if (!cpus_.empty()) pin_this_thread(cpus_[0]);
}

// region_number_ grows by a sequentially consistent store after body_ and num_phases_ are written,
// and followers read them after loading the grown number: release and acquire. Nobody writes them
// again before the region's last barrier, which every follower crosses after its last use of them.
void ThreadPool::run(int num_phases, const Body& body, bool alone) {
  if (alone || threads_ == 1) {
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
  if (!cpus_.empty()) pin_this_thread(cpus_[worker]);
  uint64_t seen = 0;
  for (;;) {
    region_bell_.wait([&] { return region_number_.load() != seen || stop_.load(); }, spin_);
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
    cross_barrier();
  }
}

// The last to arrive clears the count, then lets the others go by changing barrier_number_. A
// worker can arrive at the next barrier only after it has seen that change, hence after the count
// was cleared. What a worker wrote before the barrier is released by its fetch_add and acquired
// through the last one's; everybody else acquires it from barrier_number_.
void ThreadPool::cross_barrier() {
  const uint64_t number = barrier_number_.load();
  if (arrived_.fetch_add(1) + 1 == threads_) {
    arrived_.store(0);
    barrier_number_.store(number + 1);
    barrier_bell_.ring();
    return;
  }
  barrier_bell_.wait([&] { return barrier_number_.load() != number; }, spin_);
}

}  // namespace hybridk2
