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

// What a thread that spins does with its CPU now and then: gives it to whoever is ready to run
// there, or keeps it. A thread that yields may be away for as long as the scheduler lets the other
// one run: until the kernel's next tick, 4 ms, where that one spins (Linux 6.18).
enum class Spinning { kYields, kKeepsCpu };

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
  void wait(const Condition& condition, std::chrono::microseconds spin,
            Spinning spinning = Spinning::kYields) {
    if (spin_for(condition, spin, spinning)) return;
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
    const auto first = std::min<std::chrono::nanoseconds>(spin, timeout);
    if (spin_for(condition, first, Spinning::kYields)) return true;
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
  static bool spin_for(const Condition& condition, std::chrono::nanoseconds spin,
                       Spinning spinning) {
    if (condition()) return true;
    if (spin.count() <= 0) return false;
    const auto deadline = std::chrono::steady_clock::now() + spin;
    do {
      for (int i = 0; i < kPollsPerClockRead; ++i) {
        if (condition()) return true;
        _mm_pause();
      }
      if (spinning == Spinning::kYields) std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < deadline);
    return false;
  }

  std::atomic<int> parked_{0};
  std::mutex mutex_;
  std::condition_variable bell_;
};

}  // namespace hybridk2
