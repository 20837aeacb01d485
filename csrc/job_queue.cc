// Memory order. Three hand-overs, each with one writer at a time:
//
//  - The submitter's data (the job, the tensors behind it, weights loaded before) to the queue's
//  thread:
//    written before the push, which happens under mutex_; the pop under the same mutex acquires it.
//    submitted_ only tells the spinning thread that there is something to pop.
//  - The queue's thread to the pool's workers and back: thread_pool.cc.
//  - Results, error_ and times_ to the waiter: written before done_ is stored true, read after it
//    was loaded true. Everything the workers wrote happens before that store through the region's
//    last barrier.
#include "job_queue.h"

#include <utility>

#include "errors.h"

namespace hybridk2 {
namespace {

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void Job::wait() {
  if (!done_.load() && getpid() != process_) {
    throw StateError("this ticket belongs to the parent process, which computes it");
  }
  done_bell_.wait([this] { return done_.load(); }, waiter_spin_);
  if (error_ != nullptr) std::rethrow_exception(error_);
}

void Job::finish() {
  if (getpid() == process_) done_bell_.wait([this] { return done_.load(); }, waiter_spin_);
}

WorkTimes Job::times() const {
  if (!done_.load()) throw StateError("a job that is not done has no end yet");
  return times_;
}

JobQueue::JobQueue(std::function<void()> on_start, std::chrono::microseconds spin,
                   std::chrono::microseconds waiter_spin)
    : spin_(spin), waiter_spin_(waiter_spin) {
  thread_ = std::thread([this, on_start = std::move(on_start)] {
    on_start();
    serve();
  });
}

JobQueue::~JobQueue() {
  stop_.store(true);
  arrival_.ring();
  thread_.join();
}

Ticket JobQueue::submit(std::function<void()> work) {
  Ticket job = std::make_shared<Job>(waiter_spin_);
  job->work_ = std::move(work);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(job);
  }
  submitted_.fetch_add(1);
  arrival_.ring();
  return job;
}

Ticket JobQueue::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (jobs_.empty()) return nullptr;
  Ticket job = std::move(jobs_.front());
  jobs_.pop_front();
  return job;
}

void JobQueue::serve() {
  for (;;) {
    // Read before looking: a job pushed after an empty look makes the numbers differ.
    const int64_t submitted = submitted_.load();
    const bool stopping = stop_.load();
    if (const Ticket job = take()) {
      job->times_.began = steady_seconds();
      try {
        job->work_();
      } catch (...) {
        job->error_ = std::current_exception();
      }
      job->work_ = nullptr;
      job->times_.ended = steady_seconds();
      job->done_.store(true);
      job->done_bell_.ring();
      continue;
    }
    if (stopping) return;
    arrival_.wait([&] { return submitted_.load() != submitted || stop_.load(); }, spin_);
  }
}

}  // namespace hybridk2
