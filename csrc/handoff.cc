#include "handoff.h"

#include <sstream>
#include <stdexcept>
#include <utility>

#include "errors.h"

namespace hybridk2 {
namespace {

constexpr uintptr_t kVectorBytes = 16;  // what the kernels move at once

size_t whole_lines(size_t bytes) {
  return (bytes + kMailboxLineBytes - 1) / kMailboxLineBytes * kMailboxLineBytes;
}

const HandoffShape& checked(const HandoffShape& shape) {
  if (shape.num_layers < 1 || shape.hidden < 32 || shape.hidden % 32 != 0 || shape.top_k < 1) {
    throw std::invalid_argument(
        "a handoff needs layers, experts for each token and a multiple of "
        "32 columns, found " +
        std::to_string(shape.num_layers) + " layers, " + std::to_string(shape.top_k) +
        " experts and " + std::to_string(shape.hidden) + " columns");
  }
  if (shape.timeout.count() <= 0) throw std::invalid_argument("a timeout must be positive");
  return shape;
}

std::string seconds(std::chrono::nanoseconds duration) {
  std::ostringstream text;
  text << std::chrono::duration<double>(duration).count() << " s";
  return text.str();
}

}  // namespace

SlotRing::SlotRing(const HandoffShape& shape, DeviceStream& stream)
    : shape_(checked(shape)),
      stream_(stream),
      ids_offset_(sizeof(MailboxSlot)),
      weights_offset_(ids_offset_ + whole_lines(pick_bytes(kHandoffTokens))),
      x_offset_(weights_offset_ + whole_lines(pick_bytes(kHandoffTokens))),
      result_offset_(x_offset_ + whole_lines(x_bytes(kHandoffTokens))),
      slot_bytes_(result_offset_ + whole_lines(result_bytes(kHandoffTokens))),
      memory_(static_cast<uint8_t*>(stream.allocate_host(kHandoffSlots * slot_bytes_))) {}

SlotRing::~SlotRing() { stream_.free_host(memory_); }

MailboxSlot& SlotRing::slot(uint64_t number) const {
  return *reinterpret_cast<MailboxSlot*>(memory_ + number % kHandoffSlots * slot_bytes_);
}

LayerCall SlotRing::call(uint64_t number, int64_t layer, int64_t tokens) const {
  uint8_t* memory = reinterpret_cast<uint8_t*>(&slot(number));
  return {layer,
          tokens,
          shape_.top_k,
          memory + x_offset_,
          shape_.precision,
          reinterpret_cast<const int32_t*>(memory + ids_offset_),
          reinterpret_cast<const float*>(memory + weights_offset_),
          reinterpret_cast<float*>(memory + result_offset_)};
}

Handoff::Handoff(const HandoffShape& shape, HostWorkers workers, DeviceStream& stream)
    : shape_(shape), workers_(std::move(workers)), stream_(stream), ring_(shape, stream) {}

void Handoff::begin_step(StreamHandle stream, int64_t submissions) {
  if (step_ == Step::kOpen) throw StateError("a step is open: end it, or reset, before the next");
  if (step_ == Step::kFailed) throw StateError("the last step failed: reset before the next");
  if (submissions < 1) throw std::invalid_argument("a step has at least one submission");
  step_ = Step::kOpen;
  submissions_ = submissions;
  pending_.clear();
  begin(stream, submissions);
}

void Handoff::check_call(StreamHandle stream, int64_t layer, int64_t tokens,
                         uintptr_t address) const {
  if (layer < 0 || layer >= shape_.num_layers) {
    throw std::invalid_argument("layer slot " + std::to_string(layer) + ": expected 0 to " +
                                std::to_string(shape_.num_layers - 1));
  }
  if (tokens < 1 || tokens > kHandoffTokens) {
    throw std::invalid_argument(std::to_string(tokens) + " tokens: expected 1 to " +
                                std::to_string(kHandoffTokens));
  }
  if (address % kVectorBytes != 0) {
    throw std::invalid_argument("a tensor must begin at a multiple of " +
                                std::to_string(kVectorBytes) + " bytes");
  }
  if (step_ != Step::kOpen && !stream_.recording(stream)) {
    throw StateError("no step is open: begin one first");
  }
}

void Handoff::submit(StreamHandle stream, int64_t layer, int64_t tokens, const void* x,
                     const int32_t* expert_ids, const float* weights) {
  check_call(stream, layer, tokens, reinterpret_cast<uintptr_t>(x));
  if (pending_.size() >= kHandoffSlots) throw StateError(describe({kRingFull, layer, ""}));
  enqueue_submit(stream, layer, tokens, x, expert_ids, weights);
  pending_.push_back({layer, tokens});
}

void Handoff::collect(StreamHandle stream, int64_t layer, int64_t tokens, float* out) {
  check_call(stream, layer, tokens, reinterpret_cast<uintptr_t>(out));
  if (pending_.empty()) throw StateError(describe({kNotPublished, layer, ""}));
  const Submission oldest = pending_.front();
  if (oldest.layer != layer || oldest.tokens != tokens) {
    throw StateError("layer slot " + std::to_string(layer) + ", " + std::to_string(tokens) +
                     " tokens: collected before what was submitted first, layer slot " +
                     std::to_string(oldest.layer) + ", " + std::to_string(oldest.tokens) +
                     " tokens");
  }
  enqueue_collect(stream, layer, tokens, out);
  pending_.pop_front();
}

void Handoff::end_step() {
  if (step_ != Step::kOpen) throw StateError("no step is open: there is none to end");
  step_ = Step::kFailed;
  const Failure failed = failure();
  if (failed.code != kNoFailure) throw StateError(describe(failed));
  const int64_t got = finish_step();
  if (got != submissions_) {
    throw StateError("the step ended after " + std::to_string(got) + " of " +
                     std::to_string(submissions_) + " submissions to the host's experts");
  }
  step_ = Step::kNone;
}

void Handoff::reset() {
  if (!give_up()) {
    throw StateError("the host's experts are still busy with the step that failed, after " +
                     seconds(shape_.timeout));
  }
  pending_.clear();
  step_ = Step::kNone;
}

void Handoff::compute(const LayerCall& call) {
  const int32_t layer = static_cast<int32_t>(call.layer);
  stream_.log().add("experts begin", layer);
  workers_.compute(call);
  stream_.log().add("experts end", layer);
}

std::string Handoff::describe(const Failure& failure) const {
  const std::string where = "layer slot " + std::to_string(failure.layer) + ": ";
  switch (failure.code) {
    case kExpertsFailed:
      return where + "the host's experts failed: " + failure.message;
    case kTimedOut:
      return where + "the host's experts did not answer within " + seconds(shape_.timeout);
    case kWrongLayer:
      return where + "the host's experts answered for another layer";
    case kOverwritten:
      return where + "the answer of the host's experts was overwritten before it was read";
    case kNotPublished:
      return where + "collected, but not submitted";
    default:  // kRingFull
      return where + "submitted while " + std::to_string(kHandoffSlots) + " wait to be collected";
  }
}

}  // namespace hybridk2
