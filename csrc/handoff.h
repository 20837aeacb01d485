// A layer's tokens from a device to the host's experts, and their sum back, in the order of the
// device's stream. Owns the life of a step and the memory that both sides share; the mechanisms are
// Mailbox and HostFunctions. Knows nothing of Python, nor how experts are computed.
//
// Submitting and collecting only enqueue work for the device, so that a step may be recorded and
// replayed. What fails later is kept as a value, ends the waiting of everything behind it in the
// step, and is thrown by end_step. After a failure reset makes the next step possible.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>

#include "device_stream.h"
#include "dispatch.h"
#include "job_queue.h"
#include "layer_runner.h"

namespace hybridk2 {

// Tokens of one submission, and submissions that may wait to be collected. Two are needed when the
// next layer's are submitted before the last of this one are collected.
constexpr int64_t kHandoffTokens = 8;
constexpr uint64_t kHandoffSlots = 4;

// Who computes. enqueue: a job for the thread that is the workers' first. compute: only within such
// a job; throws what is wrong with a call.
struct HostWorkers {
  std::function<Ticket(std::function<void()>)> enqueue;
  std::function<void(const LayerCall&)> compute;
};

struct HandoffShape {
  int64_t num_layers;
  int64_t hidden;  // multiple of 32
  int64_t top_k;
  Precision precision;
  std::chrono::nanoseconds timeout;  // of one answer
  // A step that submits nothing for so long is forgotten, and its thread given back. Long enough
  // for kernels that are compiled within a first step.
  std::chrono::nanoseconds patience = std::chrono::seconds(120);
};

// The slots, in memory that both sides reach.
class SlotRing {
 public:
  // Throws std::invalid_argument, OutOfMemoryError.
  SlotRing(const HandoffShape& shape, DeviceStream& stream);
  ~SlotRing();
  SlotRing(const SlotRing&) = delete;
  SlotRing& operator=(const SlotRing&) = delete;

  MailboxSlot& slot(uint64_t number) const;
  // A slot's memory as the experts take it.
  LayerCall call(uint64_t number, int64_t layer, int64_t tokens) const;
  uint8_t* memory() const { return memory_; }
  size_t slot_bytes() const { return slot_bytes_; }
  size_t ids_offset() const { return ids_offset_; }
  size_t weights_offset() const { return weights_offset_; }
  size_t x_offset() const { return x_offset_; }
  size_t result_offset() const { return result_offset_; }
  size_t pick_bytes(int64_t tokens) const { return tokens * shape_.top_k * sizeof(int32_t); }
  size_t x_bytes(int64_t tokens) const {
    return tokens * shape_.hidden * bytes_of(shape_.precision);
  }
  size_t result_bytes(int64_t tokens) const { return tokens * shape_.hidden * sizeof(float); }

 private:
  HandoffShape shape_;
  DeviceStream& stream_;
  size_t ids_offset_;
  size_t weights_offset_;
  size_t x_offset_;
  size_t result_offset_;
  size_t slot_bytes_;
  uint8_t* memory_;
};

class Handoff {
 public:
  // stream, and what workers refer to, outlive this.
  Handoff(const HandoffShape& shape, HostWorkers workers, DeviceStream& stream);
  virtual ~Handoff() = default;
  Handoff(const Handoff&) = delete;
  Handoff& operator=(const Handoff&) = delete;

  // Before a step's first submission, or before a recorded one is replayed. submissions: how many
  // the step has. Throws StateError while another step is open or has failed.
  void begin_step(StreamHandle stream, int64_t submissions);

  // Tokens, in the device's memory, to the experts of a layer: x (tokens, hidden) at a multiple of
  // 16 bytes, expert_ids and weights (tokens, top_k); unmodified until the stream has passed this.
  // Throws std::invalid_argument for what the shape does not allow, StateError outside a step and
  // while kHandoffSlots wait to be collected.
  void submit(StreamHandle stream, int64_t layer, int64_t tokens, const void* x,
              const int32_t* expert_ids, const float* weights);

  // The oldest submission that was not collected: out (tokens, hidden), in the device's memory at a
  // multiple of 16 bytes. layer, tokens: as they were submitted. Throws likewise, and StateError
  // for another submission than that.
  void collect(StreamHandle stream, int64_t layer, int64_t tokens, float* out);

  // After the device has done the step. Throws StateError with what failed in it.
  void end_step();

  // Gives up a step that is open or has failed; returns when neither the device nor the workers are
  // in it any more. Throws StateError when the workers are not done within the timeout: then it may
  // be called again.
  void reset();

 protected:
  struct Failure {
    int32_t code = kNoFailure;
    int64_t layer = 0;
    std::string message;  // of kExpertsFailed
  };

  virtual void begin(StreamHandle stream, int64_t submissions) = 0;
  virtual void enqueue_submit(StreamHandle stream, int64_t layer, int64_t tokens, const void* x,
                              const int32_t* expert_ids, const float* weights) = 0;
  virtual void enqueue_collect(StreamHandle stream, int64_t layer, int64_t tokens, float* out) = 0;
  // What failed in the step that the device has done.
  virtual Failure failure() = 0;
  // How many submissions of the step the workers got; waits for it to end.
  virtual int64_t finish_step() = 0;
  // False: the workers are still busy with the step.
  virtual bool give_up() = 0;

  // Computes a call, as a job: with its begin and its end in the log.
  void compute(const LayerCall& call);

  const HandoffShape shape_;
  const HostWorkers workers_;
  DeviceStream& stream_;
  const SlotRing ring_;

 private:
  enum class Step { kNone, kOpen, kFailed };
  struct Submission {
    int64_t layer;
    int64_t tokens;
  };
  void check_call(StreamHandle stream, int64_t layer, int64_t tokens, uintptr_t address) const;
  std::string describe(const Failure& failure) const;

  Step step_ = Step::kNone;
  int64_t submissions_ = 0;         // of the open step
  std::deque<Submission> pending_;  // enqueued or recorded, oldest first
};

}  // namespace hybridk2
