// The handoff by shared memory: the device publishes and awaits by kernels, and the workers' first
// thread looks for what is published, from the beginning of a step to its last submission. Between
// steps nobody looks.
#pragma once

#include <atomic>
#include <string>

#include "handoff.h"

namespace hybridk2 {

class Mailbox : public Handoff {
 public:
  Mailbox(const HandoffShape& shape, HostWorkers workers, DeviceStream& stream);
  // Gives up an open step, however long its workers take. Recorded steps must not be replayed
  // afterwards.
  ~Mailbox() override;

 protected:
  void begin(StreamHandle stream, int64_t submissions) override;
  void enqueue_submit(StreamHandle stream, int64_t layer, int64_t tokens, const void* x,
                      const int32_t* expert_ids, const float* weights) override;
  void enqueue_collect(StreamHandle stream, int64_t layer, int64_t tokens, float* out) override;
  Failure failure() override;
  int64_t finish_step() override;
  bool give_up() override;

 private:
  void serve(uint64_t first, int64_t submissions);
  int32_t serve_one(MailboxSlot& slot, uint64_t number);
  bool wait_for(const MailboxSlot& slot, uint64_t number) const;

  MailboxReport* report_;
  MailboxState* state_;
  uint64_t next_number_ = 1;  // of the next step's first submission
  Ticket server_;             // of the open step
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> served_{0};
  std::string message_;  // of the experts' failure: written before its answer, read after it
};

}  // namespace hybridk2
