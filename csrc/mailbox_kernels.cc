#include "mailbox_kernels.h"

#include <immintrin.h>

#include <chrono>
#include <cstring>
#include <thread>

namespace hybridk2 {

// The offsets that the PTX below is written with.
static_assert(sizeof(std::atomic<uint64_t>) == 8 && std::atomic<uint64_t>::is_always_lock_free);
static_assert(offsetof(MailboxSlot, published) == 0 && offsetof(MailboxSlot, layer) == 8);
static_assert(offsetof(MailboxSlot, tokens) == 12 && offsetof(MailboxSlot, answered) == 128);
static_assert(offsetof(MailboxSlot, answered_layer) == 136 && offsetof(MailboxSlot, code) == 140);
static_assert(offsetof(MailboxState, to_publish) == 0 && offsetof(MailboxState, to_await) == 8);
static_assert(offsetof(MailboxState, failed) == 16);
static_assert(offsetof(MailboxReport, number) == 0 && offsetof(MailboxReport, code) == 8);
static_assert(offsetof(MailboxReport, layer) == 12);
static_assert(offsetof(BeginArguments, number) == 8 && sizeof(BeginArguments) == 16);
static_assert(offsetof(PublishArguments, state) == 8 && offsetof(PublishArguments, report) == 16);
static_assert(offsetof(PublishArguments, x) == 24 && offsetof(PublishArguments, expert_ids) == 32);
static_assert(offsetof(PublishArguments, weights) == 40);
static_assert(offsetof(PublishArguments, slot_bytes) == 48);
static_assert(offsetof(PublishArguments, ring) == 56 && offsetof(PublishArguments, x_offset) == 64);
static_assert(offsetof(PublishArguments, x_bytes) == 68);
static_assert(offsetof(PublishArguments, ids_offset) == 72);
static_assert(offsetof(PublishArguments, weights_offset) == 76);
static_assert(offsetof(PublishArguments, pick_bytes) == 80);
static_assert(offsetof(PublishArguments, layer) == 84 && offsetof(PublishArguments, tokens) == 88);
static_assert(sizeof(PublishArguments) == 96);
static_assert(offsetof(AwaitArguments, state) == 8 && offsetof(AwaitArguments, report) == 16);
static_assert(offsetof(AwaitArguments, out) == 24 && offsetof(AwaitArguments, slot_bytes) == 32);
static_assert(offsetof(AwaitArguments, ring) == 40 && offsetof(AwaitArguments, timeout_ns) == 48);
static_assert(offsetof(AwaitArguments, result_offset) == 56);
static_assert(offsetof(AwaitArguments, result_bytes) == 60);
static_assert(offsetof(AwaitArguments, layer) == 64 && sizeof(AwaitArguments) == 72);

// Why this is enough, in the terms of the PTX memory model. publish: every thread's stores come
// before the barrier, the barrier before thread 0's release at system scope, and releases are
// cumulative: who acquires the number sees all of them. await: thread 0's acquire comes before the
// barrier, the barrier before every thread's loads of the result. These name the system scope too,
// so that no cache of the card can answer them. State and report are only read by kernels behind
// this one in the stream, and by the host after the stream is done.
//
// A result of K2 is 28 KB a token and a read over the bus takes a microsecond, so await keeps four
// reads of 16 bytes in flight in each thread: a token in one go.
const char* const kMailboxPtx = R"ptx(
.version 7.0
.target sm_80
.address_size 64

.visible .entry hybridk2_begin(.param .align 8 .b8 arguments[16])
{
  .reg .b64 state, number;
  .reg .b32 none;

  ld.param.u64 state, [arguments];
  ld.param.u64 number, [arguments+8];
  cvta.to.global.u64 state, state;
  mov.u32 none, 0;
  st.global.u64 [state], number;
  st.global.u64 [state+8], number;
  st.global.u32 [state+16], none;
  ret;
}

.visible .entry hybridk2_publish(.param .align 8 .b8 arguments[96])
{
  .reg .pred stop, other;
  .reg .b32 thread, threads, failed, layer, tokens, offset, bytes, stride, code;
  .reg .b32 a, b, c, d;
  .reg .b64 slots, state, report, slot, slot_bytes, ring, number, to_await, pending;
  .reg .b64 x, ids, weights, x_slot, ids_slot, weights_slot, wide, from, to;

  ld.param.u64 slots, [arguments];
  ld.param.u64 state, [arguments+8];
  ld.param.u64 slot_bytes, [arguments+48];
  ld.param.u64 ring, [arguments+56];
  ld.param.u32 layer, [arguments+84];
  ld.param.u32 tokens, [arguments+88];
  cvta.to.global.u64 slots, slots;
  cvta.to.global.u64 state, state;
  mov.u32 thread, %tid.x;
  mov.u32 threads, %ntid.x;
  setp.ne.u32 other, thread, 0;

  // Everybody reads the state before thread 0 changes it, behind the barrier.
  ld.global.u32 failed, [state+16];
  ld.global.u64 number, [state];
  ld.global.u64 to_await, [state+8];
  setp.ne.u32 stop, failed, 0;
  @stop bra done;
  sub.u64 pending, number, to_await;
  setp.ge.u64 stop, pending, ring;
  @stop bra full;

  rem.u64 slot, number, ring;
  mad.lo.u64 slot, slot, slot_bytes, slots;

  // x, 16 bytes at a time.
  ld.param.u64 x, [arguments+24];
  cvta.to.global.u64 x, x;
  ld.param.u32 offset, [arguments+64];
  cvt.u64.u32 wide, offset;
  add.u64 x_slot, slot, wide;
  ld.param.u32 bytes, [arguments+68];
  shl.b32 offset, thread, 4;
  shl.b32 stride, threads, 4;
copy_x:
  setp.ge.u32 stop, offset, bytes;
  @stop bra copied_x;
  cvt.u64.u32 wide, offset;
  add.u64 from, x, wide;
  add.u64 to, x_slot, wide;
  ld.global.v4.u32 {a, b, c, d}, [from];
  st.global.v4.u32 [to], {a, b, c, d};
  add.u32 offset, offset, stride;
  bra copy_x;
copied_x:

  // Picks and weights, a word at a time.
  ld.param.u64 ids, [arguments+32];
  cvta.to.global.u64 ids, ids;
  ld.param.u64 weights, [arguments+40];
  cvta.to.global.u64 weights, weights;
  ld.param.u32 offset, [arguments+72];
  cvt.u64.u32 wide, offset;
  add.u64 ids_slot, slot, wide;
  ld.param.u32 offset, [arguments+76];
  cvt.u64.u32 wide, offset;
  add.u64 weights_slot, slot, wide;
  ld.param.u32 bytes, [arguments+80];
  shl.b32 offset, thread, 2;
  shl.b32 stride, threads, 2;
copy_picks:
  setp.ge.u32 stop, offset, bytes;
  @stop bra copied_picks;
  cvt.u64.u32 wide, offset;
  add.u64 from, ids, wide;
  add.u64 to, ids_slot, wide;
  ld.global.u32 a, [from];
  st.global.u32 [to], a;
  add.u64 from, weights, wide;
  add.u64 to, weights_slot, wide;
  ld.global.u32 b, [from];
  st.global.u32 [to], b;
  add.u32 offset, offset, stride;
  bra copy_picks;
copied_picks:

  bar.sync 0;
  @other bra done;
  st.global.u32 [slot+8], layer;
  st.global.u32 [slot+12], tokens;
  st.release.sys.global.u64 [slot], number;
  add.u64 number, number, 1;
  st.global.u64 [state], number;
done:
  ret;

full:
  @other bra done;
  ld.param.u64 report, [arguments+16];
  cvta.to.global.u64 report, report;
  mov.u32 code, 6;
  st.global.u64 [report], number;
  st.global.u32 [report+8], code;
  st.global.u32 [report+12], layer;
  st.global.u32 [state+16], code;
  ret;
}

.visible .entry hybridk2_await(.param .align 8 .b8 arguments[72])
{
  .reg .pred stop, other, good, in0, in1, in2, in3, get0, get1, get2, get3;
  .reg .b32 thread, threads, failed, layer, answered_layer, code, arrived;
  .reg .b32 offset0, offset1, offset2, offset3, bytes, stride;
  .reg .b32 a0, b0, c0, d0, a1, b1, c1, d1, a2, b2, c2, d2, a3, b3, c3, d3;
  .reg .b64 slots, state, report, slot, slot_bytes, ring, number, to_publish, answered;
  .reg .b64 began, now, timeout, result, out, wide, from0, from1, from2, from3, to0, to1, to2, to3;
  .shared .align 4 .b32 arrived_word;

  ld.param.u64 slots, [arguments];
  ld.param.u64 state, [arguments+8];
  ld.param.u64 slot_bytes, [arguments+32];
  ld.param.u64 ring, [arguments+40];
  cvta.to.global.u64 slots, slots;
  cvta.to.global.u64 state, state;
  mov.u32 thread, %tid.x;
  mov.u32 threads, %ntid.x;
  setp.ne.u32 other, thread, 0;

  // Everybody reads the number before thread 0 changes it, behind the barrier.
  ld.global.u64 number, [state+8];
  rem.u64 slot, number, ring;
  mad.lo.u64 slot, slot, slot_bytes, slots;
  @other bra meet;

  mov.u32 arrived, 0;
  ld.global.u32 failed, [state+16];
  setp.ne.u32 stop, failed, 0;
  @stop bra tell;
  ld.param.u32 layer, [arguments+64];
  ld.global.u64 to_publish, [state];
  mov.u32 code, 5;
  setp.ge.u64 stop, number, to_publish;
  @stop bra fail;

  ld.param.u64 timeout, [arguments+48];
  mov.u64 began, %globaltimer;
spin:
  ld.acquire.sys.global.u64 answered, [slot+128];
  setp.ge.u64 stop, answered, number;
  @stop bra answer;
  nanosleep.u32 32;
  mov.u64 now, %globaltimer;
  sub.u64 now, now, began;
  setp.lt.s64 stop, now, timeout;
  @stop bra spin;
  mov.u32 code, 2;
  bra fail;

answer:
  mov.u32 code, 4;
  setp.ne.u64 stop, answered, number;
  @stop bra fail;
  ld.relaxed.sys.global.u32 code, [slot+140];
  setp.ne.u32 stop, code, 0;
  @stop bra fail;
  ld.relaxed.sys.global.u32 answered_layer, [slot+136];
  mov.u32 code, 3;
  setp.ne.u32 stop, answered_layer, layer;
  @stop bra fail;
  mov.u32 arrived, 1;
  bra tell;

fail:
  ld.param.u64 report, [arguments+16];
  cvta.to.global.u64 report, report;
  st.global.u64 [report], number;
  st.global.u32 [report+8], code;
  st.global.u32 [report+12], layer;
  st.global.u32 [state+16], code;

tell:
  st.shared.u32 [arrived_word], arrived;
meet:
  bar.sync 0;
  ld.shared.u32 arrived, [arrived_word];
  setp.ne.u32 good, arrived, 0;

  ld.param.u64 out, [arguments+24];
  cvta.to.global.u64 out, out;
  ld.param.u32 offset0, [arguments+56];
  cvt.u64.u32 wide, offset0;
  add.u64 result, slot, wide;
  ld.param.u32 bytes, [arguments+60];
  shl.b32 offset0, thread, 4;
  shl.b32 stride, threads, 4;
copy_result:
  setp.ge.u32 stop, offset0, bytes;
  @stop bra copied_result;
  add.u32 offset1, offset0, stride;
  add.u32 offset2, offset1, stride;
  add.u32 offset3, offset2, stride;
  setp.lt.u32 in0, offset0, bytes;
  setp.lt.u32 in1, offset1, bytes;
  setp.lt.u32 in2, offset2, bytes;
  setp.lt.u32 in3, offset3, bytes;
  setp.lt.and.u32 get0, offset0, bytes, good;
  setp.lt.and.u32 get1, offset1, bytes, good;
  setp.lt.and.u32 get2, offset2, bytes, good;
  setp.lt.and.u32 get3, offset3, bytes, good;
  cvt.u64.u32 wide, offset0;
  add.u64 from0, result, wide;
  add.u64 to0, out, wide;
  cvt.u64.u32 wide, offset1;
  add.u64 from1, result, wide;
  add.u64 to1, out, wide;
  cvt.u64.u32 wide, offset2;
  add.u64 from2, result, wide;
  add.u64 to2, out, wide;
  cvt.u64.u32 wide, offset3;
  add.u64 from3, result, wide;
  add.u64 to3, out, wide;
  mov.u32 a0, 0;
  mov.u32 b0, 0;
  mov.u32 c0, 0;
  mov.u32 d0, 0;
  mov.u32 a1, 0;
  mov.u32 b1, 0;
  mov.u32 c1, 0;
  mov.u32 d1, 0;
  mov.u32 a2, 0;
  mov.u32 b2, 0;
  mov.u32 c2, 0;
  mov.u32 d2, 0;
  mov.u32 a3, 0;
  mov.u32 b3, 0;
  mov.u32 c3, 0;
  mov.u32 d3, 0;
  @get0 ld.relaxed.sys.global.v4.u32 {a0, b0, c0, d0}, [from0];
  @get1 ld.relaxed.sys.global.v4.u32 {a1, b1, c1, d1}, [from1];
  @get2 ld.relaxed.sys.global.v4.u32 {a2, b2, c2, d2}, [from2];
  @get3 ld.relaxed.sys.global.v4.u32 {a3, b3, c3, d3}, [from3];
  @in0 st.global.v4.u32 [to0], {a0, b0, c0, d0};
  @in1 st.global.v4.u32 [to1], {a1, b1, c1, d1};
  @in2 st.global.v4.u32 [to2], {a2, b2, c2, d2};
  @in3 st.global.v4.u32 [to3], {a3, b3, c3, d3};
  add.u32 offset0, offset3, stride;
  bra copy_result;
copied_result:

  @other bra done;
  add.u64 number, number, 1;
  st.global.u64 [state+8], number;
done:
  ret;
}
)ptx";

namespace {

MailboxSlot& slot_of(uint8_t* slots, uint64_t slot_bytes, uint64_t ring, uint64_t number) {
  return *reinterpret_cast<MailboxSlot*>(slots + number % ring * slot_bytes);
}

void fail(MailboxState& state, MailboxReport& report, uint64_t number, int32_t code,
          int32_t layer) {
  report = {number, code, layer};
  state.failed = static_cast<uint32_t>(code);
}

// The code of a failure, or kNoFailure once the answer is there.
int32_t wait_for_answer(const AwaitArguments& arguments, const MailboxSlot& slot, uint64_t number) {
  if (number >= arguments.state->to_publish) return kNotPublished;
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::nanoseconds(arguments.timeout_ns);
  uint64_t answered;
  while ((answered = slot.answered.load(std::memory_order_acquire)) < number) {
    if (std::chrono::steady_clock::now() >= deadline) return kTimedOut;
    std::this_thread::yield();
  }
  if (answered != number) return kOverwritten;
  if (slot.code != kNoFailure) return slot.code;
  return slot.answered_layer == arguments.layer ? kNoFailure : kWrongLayer;
}

}  // namespace

void begin_twin(const BeginArguments& arguments) {
  *arguments.state = {arguments.number, arguments.number, 0};
}

void publish_twin(const PublishArguments& arguments, EventLog& log) {
  MailboxState& state = *arguments.state;
  if (state.failed != 0) return;
  const uint64_t number = state.to_publish;
  if (number - state.to_await >= arguments.ring) {
    fail(state, *arguments.report, number, kRingFull, arguments.layer);
    return;
  }
  MailboxSlot& slot = slot_of(arguments.slots, arguments.slot_bytes, arguments.ring, number);
  uint8_t* memory = reinterpret_cast<uint8_t*>(&slot);
  std::memcpy(memory + arguments.x_offset, arguments.x, arguments.x_bytes);
  std::memcpy(memory + arguments.ids_offset, arguments.expert_ids, arguments.pick_bytes);
  std::memcpy(memory + arguments.weights_offset, arguments.weights, arguments.pick_bytes);
  slot.layer = arguments.layer;
  slot.tokens = arguments.tokens;
  log.add("publish", arguments.layer);
  slot.published.store(number, std::memory_order_release);
  state.to_publish = number + 1;
}

void await_twin(const AwaitArguments& arguments, EventLog& log) {
  MailboxState& state = *arguments.state;
  const uint64_t number = state.to_await;
  MailboxSlot& slot = slot_of(arguments.slots, arguments.slot_bytes, arguments.ring, number);
  log.add("await begins", arguments.layer);
  if (state.failed == 0) {
    const int32_t code = wait_for_answer(arguments, slot, number);
    if (code != kNoFailure) fail(state, *arguments.report, number, code, arguments.layer);
  }
  if (state.failed == 0) {
    const uint8_t* result = reinterpret_cast<uint8_t*>(&slot) + arguments.result_offset;
    std::memcpy(arguments.out, result, arguments.result_bytes);
  } else {
    std::memset(arguments.out, 0, arguments.result_bytes);
  }
  state.to_await = number + 1;
  log.add("await ends", arguments.layer);
}

}  // namespace hybridk2
