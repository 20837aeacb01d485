#include "host_functions.h"

#include <exception>
#include <utility>

namespace hybridk2 {

HostFunctions::HostFunctions(const HandoffShape& shape, HostWorkers workers, DeviceStream& stream)
    : Handoff(shape, std::move(workers), stream) {}

HostFunctions::~HostFunctions() {
  try {
    stream_.synchronize();
  } catch (const std::exception&) {
    // What the device failed with was thrown where it was used; here its memory is only given back.
  }
  for (const Ticket& ticket : tickets_) {
    if (ticket != nullptr) ticket->finish();
  }
}

// Nothing of an earlier step runs any more, so the stream's members may be set from here.
void HostFunctions::begin(StreamHandle, int64_t) {
  failure_ = {};
  started_ = 0;
  submitted_ = collected_ = 0;
}

HostFunctions::Crossing* HostFunctions::crossing(uint64_t slot, int64_t layer, int64_t tokens) {
  std::unique_ptr<Crossing>& made = crossings_[{slot, layer, tokens}];
  if (made == nullptr) made.reset(new Crossing{this, slot, layer, tokens});
  return made.get();
}

void HostFunctions::enqueue_submit(StreamHandle stream, int64_t layer, int64_t tokens,
                                   const void* x, const int32_t* expert_ids, const float* weights) {
  const uint64_t slot = submitted_++ % kHandoffSlots;
  uint8_t* memory = reinterpret_cast<uint8_t*>(&ring_.slot(slot));
  stream_.copy(stream, memory + ring_.x_offset(), x, ring_.x_bytes(tokens));
  stream_.copy(stream, memory + ring_.ids_offset(), expert_ids, ring_.pick_bytes(tokens));
  stream_.copy(stream, memory + ring_.weights_offset(), weights, ring_.pick_bytes(tokens));
  stream_.call_host(stream, &on_submit, crossing(slot, layer, tokens));
}

void HostFunctions::enqueue_collect(StreamHandle stream, int64_t layer, int64_t tokens,
                                    float* out) {
  const uint64_t slot = collected_++ % kHandoffSlots;
  stream_.call_host(stream, &on_collect, crossing(slot, layer, tokens));
  stream_.copy(stream, out, ring_.call(slot, layer, tokens).out, ring_.result_bytes(tokens));
}

void HostFunctions::on_submit(void* crossing) {
  guard(*static_cast<Crossing*>(crossing), &HostFunctions::start);
}

void HostFunctions::on_collect(void* crossing) {
  guard(*static_cast<Crossing*>(crossing), &HostFunctions::wait);
}

// Threads of the driver come here: an exception that left would end the process.
void HostFunctions::guard(const Crossing& crossing, void (HostFunctions::*step)(const Crossing&)) {
  HostFunctions& owner = *crossing.owner;
  try {
    (owner.*step)(crossing);
  } catch (const std::exception& error) {
    owner.fail(kExpertsFailed, crossing.layer, error.what());
  } catch (...) {
    owner.fail(kExpertsFailed, crossing.layer, "an exception of an unknown kind");
  }
}

void HostFunctions::start(const Crossing& crossing) {
  if (failure_.code != kNoFailure) return;
  stream_.log().add("publish", static_cast<int32_t>(crossing.layer));
  const LayerCall call = ring_.call(crossing.slot, crossing.layer, crossing.tokens);
  tickets_[crossing.slot] = workers_.enqueue([this, call] { compute(call); });
  ++started_;
}

void HostFunctions::wait(const Crossing& crossing) {
  const int32_t layer = static_cast<int32_t>(crossing.layer);
  stream_.log().add("await begins", layer);
  if (failure_.code != kNoFailure) return;
  const Ticket& ticket = tickets_[crossing.slot];
  if (!ticket->wait_for(shape_.timeout)) return fail(kTimedOut, crossing.layer, "");
  ticket->wait();
  stream_.log().add("await ends", layer);
}

void HostFunctions::fail(int32_t code, int64_t layer, std::string message) {
  if (failure_.code == kNoFailure) failure_ = {code, layer, std::move(message)};
}

Handoff::Failure HostFunctions::failure() { return failure_; }

int64_t HostFunctions::finish_step() {
  for (const Ticket& ticket : tickets_) {
    if (ticket != nullptr) ticket->wait_for(shape_.timeout);
  }
  return started_;
}

bool HostFunctions::give_up() {
  stream_.synchronize();
  for (Ticket& ticket : tickets_) {
    if (ticket != nullptr && !ticket->wait_for(shape_.timeout)) return false;
    ticket = nullptr;
  }
  submitted_ = collected_ = 0;
  return true;
}

}  // namespace hybridk2
