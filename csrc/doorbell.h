// Waiting for another thread: spin for a moment, then sleep.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace hybridk2 {

// One side changes an atomic and rings; the other waits until its condition on that atomic holds.
//
// No wake-up is lost: the ringer stores its atomic, then loads parked_; the waiter adds to parked_,
// then loads the atomic. All four are sequentially consistent, so at least one side sees the other.
// A ringer that sees a parked waiter takes the mutex, which the waiter holds from its announcement
// until it sleeps: the notification cannot fall in between. Conditions must therefore load with the
// default (sequentially consistent) order, and the change before ring() must be stored with it.
class Doorbell {
 public:
  template <typename Condition>
  void wait(const Condition& condition, std::chrono::microseconds spin) {
    if (condition()) return;
    if (spin.count() > 0) {
      const auto deadline = std::chrono::steady_clock::now() + spin;
      do {
        for (int i = 0; i < kPollsPerClockRead; ++i) {
          if (condition()) return;
          _mm_pause();
        }
        // What this thread waits for may need its CPU: a caller, when workers have all of them.
        std::this_thread::yield();
      } while (std::chrono::steady_clock::now() < deadline);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    parked_.fetch_add(1);
    bell_.wait(lock, condition);
    parked_.fetch_sub(1);
  }

  void ring() {
    if (parked_.load() == 0) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }
    bell_.notify_all();
  }

 private:
  static constexpr int kPollsPerClockRead = 32;

  std::atomic<int> parked_{0};
  std::mutex mutex_;
  std::condition_variable bell_;
};

}  // namespace hybridk2
