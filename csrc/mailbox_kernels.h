// The memory that a device and the host's experts share, and what a device does with it: three
// small kernels, as PTX for cards and as their twins in C++ for a device without one. Knows nothing
// of who launches them nor of what experts are.
//
// A submission has a number; numbers only grow. Number n uses slot n % ring. The device publishes
// its tokens there and later awaits the answer; the order of the stream in which it does both makes
// sure that a slot is published anew only after its last answer was read, and the device checks it.
//
// Every word has one writer. The two that say "all before this is there" are the slot's `published`
// (the device releases, the host acquires) and `answered` (the other way round), at system scope on
// the card; nothing else is ever looked at while it may change. How far the device is (`state`)
// lies in its own memory: a recorded step that is replayed carries no number.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "event_log.h"

namespace hybridk2 {

// Apart by two cache lines, which processors fetch in pairs, so that each side polls and writes
// lines of its own.
constexpr size_t kMailboxLineBytes = 128;

// Why a step failed.
enum MailboxCode : int32_t {
  kNoFailure = 0,
  kExpertsFailed = 1,  // the host's message says how
  kTimedOut = 2,       // no answer in time
  kWrongLayer = 3,     // the answer is another layer's
  kOverwritten = 4,    // the answer is a later submission's
  kNotPublished = 5,   // awaited, but not submitted
  kRingFull = 6,       // submitted more than there are slots without collecting
};

struct alignas(kMailboxLineBytes) MailboxSlot {
  // Written by the device.
  std::atomic<uint64_t> published;
  int32_t layer;
  int32_t tokens;
  // Written by the host.
  alignas(kMailboxLineBytes) std::atomic<uint64_t> answered;
  int32_t answered_layer;
  int32_t code;
  // Picks, weights, activations and result follow, where SlotRing puts them.
};

// Of the device: the numbers that it publishes and awaits next, and whether this step has failed.
struct MailboxState {
  uint64_t to_publish;
  uint64_t to_await;
  uint32_t failed;
};

// The first failure of a step, written by the device and read by the host when the step is done.
struct MailboxReport {
  uint64_t number;
  int32_t code;
  int32_t layer;
};

// A step begins: its first number is `number`, nothing has failed.
struct BeginArguments {
  MailboxState* state;
  uint64_t number;
};

// Copies tokens into the next slot and says so. Bytes of x: a multiple of 16, as its address is.
struct PublishArguments {
  uint8_t* slots;
  MailboxState* state;
  MailboxReport* report;
  const void* x;
  const int32_t* expert_ids;
  const float* weights;
  uint64_t slot_bytes;
  uint64_t ring;
  uint32_t x_offset;  // in the slot, as the other offsets
  uint32_t x_bytes;
  uint32_t ids_offset;
  uint32_t weights_offset;
  uint32_t pick_bytes;  // of the ids, and of the weights
  int32_t layer;
  int32_t tokens;
};

// Waits for the answer to the oldest submission that was not awaited yet and copies it to `out`; in
// a step that has failed, or fails here, writes zeros instead and does not wait.
struct AwaitArguments {
  uint8_t* slots;
  MailboxState* state;
  MailboxReport* report;
  float* out;
  uint64_t slot_bytes;
  uint64_t ring;
  uint64_t timeout_ns;
  uint32_t result_offset;
  uint32_t result_bytes;  // a multiple of 16, as the address of `out` is
  int32_t layer;
};

// PTX for Ampere and newer; entries hybridk2_begin, hybridk2_publish, hybridk2_await, each with its
// arguments by value, for one block of any number of threads.
extern const char* const kMailboxPtx;
constexpr unsigned kMailboxThreads = 1024;

// The same on the calling thread.
void begin_twin(const BeginArguments& arguments);
void publish_twin(const PublishArguments& arguments, EventLog& log);
void await_twin(const AwaitArguments& arguments, EventLog& log);

}  // namespace hybridk2
