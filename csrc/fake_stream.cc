#include "fake_stream.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "errors.h"

namespace hybridk2 {

FakeStream::FakeStream(uint32_t seed, std::chrono::microseconds max_delay)
    : random_(seed), delay_(0, max_delay.count()), thread_([this] { run(); }) {}

FakeStream::~FakeStream() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void* FakeStream::allocate_host(size_t bytes) {
  void* memory = std::aligned_alloc(kMailboxLineBytes, bytes);
  if (memory == nullptr) throw OutOfMemoryError("a fake device's buffers", bytes);
  return std::memset(memory, 0, bytes);
}

void* FakeStream::allocate_device(size_t bytes) { return allocate_host(bytes); }

void FakeStream::free_host(void* memory) noexcept { std::free(memory); }

void FakeStream::free_device(void* memory) noexcept { std::free(memory); }

void FakeStream::begin(StreamHandle, const BeginArguments& arguments) {
  enqueue([arguments] { begin_twin(arguments); });
}

void FakeStream::publish(StreamHandle, const PublishArguments& arguments) {
  enqueue([this, arguments] { publish_twin(arguments, log()); });
}

void FakeStream::await(StreamHandle, const AwaitArguments& arguments) {
  enqueue([this, arguments] { await_twin(arguments, log()); });
}

void FakeStream::call_host(StreamHandle, void (*function)(void*), void* data) {
  enqueue([function, data] { function(data); });
}

void FakeStream::copy(StreamHandle, void* to, const void* from, size_t bytes) {
  enqueue([to, from, bytes] { std::memcpy(to, from, bytes); });
}

void FakeStream::work(const std::string& name, int32_t layer, std::chrono::microseconds duration) {
  enqueue([this, name, layer, duration] {
    log().add((name + " begins").c_str(), layer);
    std::this_thread::sleep_for(duration);
    log().add((name + " ends").c_str(), layer);
  });
}

bool FakeStream::recording(StreamHandle) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return recording_;
}

void FakeStream::synchronize() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return operations_.empty() && !busy_; });
}

void FakeStream::begin_recording() {
  const std::lock_guard<std::mutex> lock(mutex_);
  recorded_.clear();
  recording_ = true;
}

void FakeStream::end_recording() {
  const std::lock_guard<std::mutex> lock(mutex_);
  recording_ = false;
}

void FakeStream::replay() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    operations_.insert(operations_.end(), recorded_.begin(), recorded_.end());
  }
  changed_.notify_all();
}

void FakeStream::enqueue(Operation operation) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (recording_) {
      recorded_.push_back(std::move(operation));
    } else {
      operations_.push_back(std::move(operation));
    }
  }
  changed_.notify_all();
}

void FakeStream::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return !operations_.empty() || stop_; });
    if (operations_.empty()) return;
    const Operation operation = std::move(operations_.front());
    operations_.pop_front();
    busy_ = true;
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(delay_(random_)));
    operation();
    lock.lock();
    busy_ = false;
    changed_.notify_all();
  }
}

}  // namespace hybridk2
