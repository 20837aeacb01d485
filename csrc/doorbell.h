// Waiting for another thread: spin for a moment, then sleep.
#pragma once

#include <immintrin.h>

#include <algorithm>
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
    if (spin_for(condition, spin)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    parked_.fetch_add(1);
    bell_.wait(lock, condition);
    parked_.fetch_sub(1);
  }

  // The same for no longer than `timeout`; false: the condition does not hold yet.
  template <typename Condition>
  bool wait_for(const Condition& condition, std::chrono::microseconds spin,
                std::chrono::nanoseconds timeout) {
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    if (spin_for(condition, std::min<std::chrono::nanoseconds>(spin, timeout))) return true;
    std::unique_lock<std::mutex> lock(mutex_);
    parked_.fetch_add(1);
    bool holds = condition();
    // By the system's clock, whose waits ThreadSanitizer knows; whether time is up says the steady
    // one.
    for (auto left = timeout; !holds; left = deadline - std::chrono::steady_clock::now()) {
      if (left.count() <= 0) break;
      holds = bell_.wait_until(lock, std::chrono::system_clock::now() + left, condition);
    }
    parked_.fetch_sub(1);
    return holds;
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

  template <typename Condition>
  static bool spin_for(const Condition& condition, std::chrono::nanoseconds spin) {
    if (condition()) return true;
    if (spin.count() <= 0) return false;
    const auto deadline = std::chrono::steady_clock::now() + spin;
    do {
      for (int i = 0; i < kPollsPerClockRead; ++i) {
        if (condition()) return true;
        _mm_pause();
      }
      // What this thread waits for may need its CPU: a caller, when workers have all of them.
      std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < deadline);
    return false;
  }

  std::atomic<int> parked_{0};
  std::mutex mutex_;
  std::condition_variable bell_;
};

}  // namespace hybridk2
