// What a device does in order: the mailbox's kernels, functions of the host, copies. CudaStream is
// a card's, FakeStream a thread without one. Knows nothing of experts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "event_log.h"
#include "mailbox_kernels.h"

namespace hybridk2 {

// Which of a device's streams: for a card, the driver's handle as an integer.
using StreamHandle = uintptr_t;

class DeviceStream {
 public:
  virtual ~DeviceStream() = default;

  // Zeroed memory, a multiple of kMailboxLineBytes, at such an address: the host's, which the
  // device reads and writes at the same address, and the device's own. Throws OutOfMemoryError.
  virtual void* allocate_host(size_t bytes) = 0;
  virtual void* allocate_device(size_t bytes) = 0;
  virtual void free_host(void* memory) noexcept = 0;
  virtual void free_device(void* memory) noexcept = 0;

  // Enqueued behind what the stream has to do, or recorded where it is being recorded. Throw
  // StateError with the device's reason.
  virtual void begin(StreamHandle stream, const BeginArguments& arguments) = 0;
  virtual void publish(StreamHandle stream, const PublishArguments& arguments) = 0;
  virtual void await(StreamHandle stream, const AwaitArguments& arguments) = 0;
  // function: throws nothing and calls nothing of the device. data: alive as long as it may run.
  virtual void call_host(StreamHandle stream, void (*function)(void*), void* data) = 0;
  virtual void copy(StreamHandle stream, void* to, const void* from, size_t bytes) = 0;

  // Whether what is enqueued now is recorded, to be done later, instead of done.
  virtual bool recording(StreamHandle stream) const = 0;
  // Returns when all streams of the device have done what they have to do. Throws StateError with
  // what failed.
  virtual void synchronize() = 0;

  EventLog& log() { return log_; }

 private:
  EventLog log_;
};

}  // namespace hybridk2
