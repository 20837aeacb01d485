// The handoff by functions of the host that the device's stream calls between copies. Simpler than
// the mailbox, and dearer: each call wakes a thread of the driver.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "handoff.h"

namespace hybridk2 {

class HostFunctions : public Handoff {
 public:
  HostFunctions(const HandoffShape& shape, HostWorkers workers, DeviceStream& stream);
  // Waits for the device and the workers. Recorded steps must not be replayed afterwards.
  ~HostFunctions() override;

 protected:
  void begin(StreamHandle stream, int64_t submissions) override;
  void enqueue_submit(StreamHandle stream, int64_t layer, int64_t tokens, const void* x,
                      const int32_t* expert_ids, const float* weights) override;
  void enqueue_collect(StreamHandle stream, int64_t layer, int64_t tokens, float* out) override;
  Failure failure() override;
  int64_t finish_step() override;
  bool give_up() override;

 private:
  // What a function of the host is called with, in this step and whenever it is replayed.
  struct Crossing {
    HostFunctions* owner;
    uint64_t slot;
    int64_t layer;
    int64_t tokens;
  };

  static void on_submit(void* crossing);
  static void on_collect(void* crossing);
  static void guard(const Crossing& crossing, void (HostFunctions::*step)(const Crossing&));
  void start(const Crossing& crossing);
  void wait(const Crossing& crossing);
  void fail(int32_t code, int64_t layer, std::string message);
  Crossing* crossing(uint64_t slot, int64_t layer, int64_t tokens);

  // By slot, layer and tokens: as many as a model has layers and steps have sizes.
  std::map<std::tuple<uint64_t, int64_t, int64_t>, std::unique_ptr<Crossing>> crossings_;
  // Of the thread that enqueues: submissions so far, and how many of them are collected.
  uint64_t submitted_ = 0;
  uint64_t collected_ = 0;
  // Of the stream, which calls one function at a time; elsewhere when it has been synchronised
  // with.
  std::array<Ticket, kHandoffSlots> tickets_;
  int64_t started_ = 0;
  Failure failure_;
};

}  // namespace hybridk2
