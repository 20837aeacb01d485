// What happened when, on the steady clock: the proof that two sides worked at the same time.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace hybridk2 {

struct Event {
  std::string name;
  int32_t layer;
  double seconds;  // of the steady clock, which is the one of Python's time.perf_counter
};

// Off until asked: then every thread may add to it.
class EventLog {
 public:
  void record(bool on) { on_.store(on); }

  void add(const char* name, int32_t layer) {
    if (!on_.load(std::memory_order_relaxed)) return;
    // The time is taken within the lock, so that the order of the log is that of its times.
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::chrono::duration<double> now = std::chrono::steady_clock::now().time_since_epoch();
    events_.push_back({name, layer, now.count()});
  }

  // All so far, in the order in which they were added; the log is empty then.
  std::vector<Event> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(events_, {});
  }

 private:
  std::atomic<bool> on_{false};
  std::mutex mutex_;
  std::vector<Event> events_;
};

}  // namespace hybridk2
