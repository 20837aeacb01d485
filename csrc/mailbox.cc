// Memory order: mailbox_kernels.h for the slots. What the host's threads share besides: the server
// begins behind its submission to the queue, which publishes all that begin() wrote; message_ is
// written before the answer that carries kExpertsFailed and read after the device, which saw that
// answer, was synchronised with.
#include "mailbox.h"

#include <immintrin.h>

#include <chrono>
#include <exception>
#include <stdexcept>
#include <thread>
#include <utility>

namespace hybridk2 {
namespace {

constexpr int kPollsPerClockRead = 64;

}  // namespace

Mailbox::Mailbox(const HandoffShape& shape, HostWorkers workers, DeviceStream& stream)
    : Handoff(shape, std::move(workers), stream),
      report_(static_cast<MailboxReport*>(stream.allocate_host(kMailboxLineBytes))) {
  try {
    state_ = static_cast<MailboxState*>(stream.allocate_device(kMailboxLineBytes));
  } catch (...) {
    stream.free_host(report_);
    throw;
  }
}

Mailbox::~Mailbox() {
  try {
    stream_.synchronize();
  } catch (const std::exception&) {
    // What the device failed with was thrown where it was used; here its memory is only given back.
  }
  stop_.store(true);
  if (server_ != nullptr) server_->finish();
  stream_.free_device(state_);
  stream_.free_host(report_);
}

void Mailbox::begin(StreamHandle stream, int64_t submissions) {
  *report_ = {};
  stop_.store(false);
  served_.store(0);
  const uint64_t first = next_number_;
  next_number_ += submissions;
  server_ = workers_.enqueue([this, first, submissions] { serve(first, submissions); });
  stream_.begin(stream, {state_, first});
}

void Mailbox::enqueue_submit(StreamHandle stream, int64_t layer, int64_t tokens, const void* x,
                             const int32_t* expert_ids, const float* weights) {
  PublishArguments arguments{};
  arguments.slots = ring_.memory();
  arguments.state = state_;
  arguments.report = report_;
  arguments.x = x;
  arguments.expert_ids = expert_ids;
  arguments.weights = weights;
  arguments.slot_bytes = ring_.slot_bytes();
  arguments.ring = kHandoffSlots;
  arguments.x_offset = static_cast<uint32_t>(ring_.x_offset());
  arguments.x_bytes = static_cast<uint32_t>(ring_.x_bytes(tokens));
  arguments.ids_offset = static_cast<uint32_t>(ring_.ids_offset());
  arguments.weights_offset = static_cast<uint32_t>(ring_.weights_offset());
  arguments.pick_bytes = static_cast<uint32_t>(ring_.pick_bytes(tokens));
  arguments.layer = static_cast<int32_t>(layer);
  arguments.tokens = static_cast<int32_t>(tokens);
  stream_.publish(stream, arguments);
}

void Mailbox::enqueue_collect(StreamHandle stream, int64_t layer, int64_t tokens, float* out) {
  AwaitArguments arguments{};
  arguments.slots = ring_.memory();
  arguments.state = state_;
  arguments.report = report_;
  arguments.out = out;
  arguments.slot_bytes = ring_.slot_bytes();
  arguments.ring = kHandoffSlots;
  arguments.timeout_ns = static_cast<uint64_t>(shape_.timeout.count());
  arguments.result_offset = static_cast<uint32_t>(ring_.result_offset());
  arguments.result_bytes = static_cast<uint32_t>(ring_.result_bytes(tokens));
  arguments.layer = static_cast<int32_t>(layer);
  stream_.await(stream, arguments);
}

Handoff::Failure Mailbox::failure() {
  const MailboxReport report = *report_;
  return {report.code, report.layer, report.code == kExpertsFailed ? message_ : std::string()};
}

int64_t Mailbox::finish_step() {
  // The device is done: what it has not published by now it never will.
  const uint64_t last = next_number_ - 1;
  if (ring_.slot(last).published.load(std::memory_order_acquire) < last) stop_.store(true);
  server_->wait_for(shape_.timeout);
  return served_.load();
}

// The device first: what it still publishes is answered, so that it waits for nothing that was
// given up.
bool Mailbox::give_up() {
  try {
    stream_.synchronize();
  } catch (...) {
    stop_.store(true);
    throw;
  }
  stop_.store(true);
  if (server_ != nullptr && !server_->wait_for(shape_.timeout)) return false;
  server_ = nullptr;
  return true;
}

// Answers every submission, failures too, up to the first that fails: the device awaits nothing
// behind it. Ends earlier when nothing more will be published. Runs as a job, hence where experts
// may be computed, and throws nothing.
void Mailbox::serve(uint64_t first, int64_t submissions) {
  for (uint64_t number = first; number < first + submissions; ++number) {
    MailboxSlot& slot = ring_.slot(number);
    if (!wait_for(slot, number)) return;
    const int32_t code = serve_one(slot, number);
    slot.code = code;
    if (code == kNoFailure) served_.fetch_add(1);
    slot.answered.store(number, std::memory_order_release);
    if (code != kNoFailure) return;
  }
}

int32_t Mailbox::serve_one(MailboxSlot& slot, uint64_t number) {
  try {
    slot.answered_layer = slot.layer;
    compute(ring_.call(number, slot.layer, slot.tokens));
    return kNoFailure;
  } catch (const std::exception& error) {
    message_ = error.what();
  } catch (...) {
    message_ = "an exception of an unknown kind";
  }
  return kExpertsFailed;
}

// Spins: to sleep would cost more than the handoff. It yields now and then, for machines that have
// no core to spare for this thread.
bool Mailbox::wait_for(const MailboxSlot& slot, uint64_t number) const {
  const auto forgotten = std::chrono::steady_clock::now() + shape_.patience;
  do {
    for (int poll = 0; poll < kPollsPerClockRead; ++poll) {
      if (slot.published.load(std::memory_order_acquire) >= number) return true;
      if (stop_.load(std::memory_order_relaxed)) return false;
      _mm_pause();
    }
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < forgotten);
  return false;
}

}  // namespace hybridk2
