// Work handed to one thread, in order: submit, keep the ticket, wait. Knows nothing of what the
// work is.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "doorbell.h"

namespace hybridk2 {

// Seconds on the steady clock, which is the one of Python's time.perf_counter.
struct WorkTimes {
  double began;
  double ended;
};

// A submitted job. Outlives its queue.
class Job {
 public:
  explicit Job(std::chrono::microseconds waiter_spin) : waiter_spin_(waiter_spin) {}

  // Returns when the job is done; throws what the job threw, or StateError in a child of fork(),
  // which has no thread to do it. Any thread, any number of times.
  void wait();
  // The same, without throwing; in a child of fork() it returns at once.
  void finish();
  bool done() const { return done_.load(); }
  // Whether the job is done within the timeout; throws nothing of what it threw.
  bool wait_for(std::chrono::nanoseconds timeout) {
    return done_bell_.wait_for([this] { return done_.load(); }, waiter_spin_, timeout);
  }
  // When a job that is done ran, from its first moment to its last. Throws StateError before.
  WorkTimes times() const;

 private:
  friend class JobQueue;
  std::chrono::microseconds waiter_spin_;
  pid_t process_ = getpid();
  std::function<void()> work_;
  std::exception_ptr error_;  // written before done_, read after
  WorkTimes times_{};         // likewise
  std::atomic<bool> done_{false};
  Doorbell done_bell_;
};

using Ticket = std::shared_ptr<Job>;

class JobQueue {
 public:
  // on_start runs first on the queue's thread. spin: how long that thread spins for the next job;
  // waiter_spin: how long those who wait for a job spin.
  JobQueue(std::function<void()> on_start, std::chrono::microseconds spin,
           std::chrono::microseconds waiter_spin);
  // Finishes every submitted job.
  ~JobQueue();
  JobQueue(const JobQueue&) = delete;
  JobQueue& operator=(const JobQueue&) = delete;

  // Any thread. Jobs run one at a time, in the order of submission.
  Ticket submit(std::function<void()> work);

 private:
  void serve();
  Ticket take();

  std::chrono::microseconds spin_;
  std::chrono::microseconds waiter_spin_;
  std::mutex mutex_;
  std::deque<Ticket> jobs_;  // under mutex_
  std::atomic<int64_t> submitted_{0};
  std::atomic<bool> stop_{false};
  Doorbell arrival_;
  std::thread thread_;
};

}  // namespace hybridk2
