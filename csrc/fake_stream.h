// A stream without a device, for tests: a thread that does what it is given in order, each thing
// after a random delay, with the kernels' twins. Its device's memory is the host's.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "device_stream.h"

namespace hybridk2 {

class FakeStream : public DeviceStream {
 public:
  // Delays are uniform from 0 to max_delay; seed: of their sequence.
  FakeStream(uint32_t seed, std::chrono::microseconds max_delay);
  // Does what was enqueued before.
  ~FakeStream() override;
  FakeStream(const FakeStream&) = delete;
  FakeStream& operator=(const FakeStream&) = delete;

  void* allocate_host(size_t bytes) override;
  void* allocate_device(size_t bytes) override;
  void free_host(void* memory) noexcept override;
  void free_device(void* memory) noexcept override;
  void begin(StreamHandle stream, const BeginArguments& arguments) override;
  void publish(StreamHandle stream, const PublishArguments& arguments) override;
  void await(StreamHandle stream, const AwaitArguments& arguments) override;
  void call_host(StreamHandle stream, void (*function)(void*), void* data) override;
  void copy(StreamHandle stream, void* to, const void* from, size_t bytes) override;
  bool recording(StreamHandle stream) const override;
  void synchronize() override;

  // Work of the device that takes so long, in the log with its begin and its end.
  void work(const std::string& name, int32_t layer, std::chrono::microseconds duration);
  // Between the two, what is enqueued is recorded instead of done; then it is done by every replay.
  void begin_recording();
  void end_recording();
  void replay();

 private:
  using Operation = std::function<void()>;
  void enqueue(Operation operation);
  void run();

  std::mt19937 random_;
  std::uniform_int_distribution<int64_t> delay_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Operation> operations_;  // under mutex_, as all that follows
  std::vector<Operation> recorded_;
  bool recording_ = false;
  bool busy_ = false;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace hybridk2
