// Both handoffs against a stream without a card, with random delays: every sum arrives whatever the
// delays, faults end a step as errors within the timeout and leave the next one sound. Meant for
// ThreadSanitizer. The card's stream runs against a driver of the test's own.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda_stream.h"
#include "errors.h"
#include "fake_stream.h"
#include "host_functions.h"
#include "mailbox.h"

using namespace hybridk2;
using namespace std::chrono_literals;

namespace {

constexpr int64_t kLayers = 5;
constexpr int64_t kHidden = 64;
constexpr int64_t kTopK = 3;
constexpr auto kLongTimeout = 20s;
constexpr auto kShortTimeout = 40ms;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// What stands for experts: depends on every value that crosses.
float expected(int64_t layer, const float* x, const int32_t* ids, const float* weights, int64_t j) {
  float sum = static_cast<float>(layer);
  for (int64_t k = 0; k < kTopK; ++k) sum += weights[k] * x[j] * static_cast<float>(ids[k]);
  return sum;
}

// Slots hold NaN wherever nobody may look: a result until it is computed, inputs afterwards.
void compute(const LayerCall& call) {
  const float* x = static_cast<const float*>(call.x);
  const int64_t values = call.num_tokens * kHidden;
  std::fill_n(call.out, values, kNan);
  std::this_thread::yield();
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    for (int64_t j = 0; j < kHidden; ++j) {
      call.out[t * kHidden + j] = expected(call.layer, x + t * kHidden, call.expert_ids + t * kTopK,
                                           call.weights + t * kTopK, j);
    }
  }
  std::fill_n(static_cast<float*>(const_cast<void*>(call.x)), values, kNan);
}

// Tensors of the device.
struct Tokens {
  alignas(16) float x[kHandoffTokens * kHidden];
  int32_t ids[kHandoffTokens * kTopK];
  float weights[kHandoffTokens * kTopK];
  alignas(16) float out[kHandoffTokens * kHidden];
  int64_t layer;
  int64_t count;

  void fill(int64_t of_layer, int64_t tokens, std::mt19937& random) {
    layer = of_layer;
    count = tokens;
    for (float& value : x) value = static_cast<float>(random() % 1000);
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % 7);
    for (float& weight : weights) weight = static_cast<float>(random() % 8);
    std::fill(std::begin(out), std::end(out), kNan);
  }
  bool right() const {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t j = 0; j < kHidden; ++j) {
        const float value =
            expected(layer, x + t * kHidden, ids + t * kTopK, weights + t * kTopK, j);
        if (out[t * kHidden + j] != value) return false;
      }
    }
    return true;
  }
  bool zero() const {
    for (int64_t i = 0; i < count * kHidden; ++i) {
      if (out[i] != 0) return false;
    }
    return true;
  }
};

enum class Mechanism { kMailbox, kHostFunctions };
using Compute = std::function<void(const LayerCall&)>;

// A device, the workers' first thread, and the handoff between them.
struct Sides {
  std::mt19937 random{11};
  JobQueue queue{[] {}, 50us, 50us};
  FakeStream stream{5, 60us};
  Compute compute_now = compute;  // changed only between steps
  std::unique_ptr<Handoff> handoff;
  std::vector<Tokens> tokens{kLayers};

  Sides(Mechanism mechanism, std::chrono::nanoseconds timeout,
        std::chrono::nanoseconds patience = kLongTimeout) {
    const HandoffShape shape{kLayers, kHidden, kTopK, Precision::kFp32, timeout, patience};
    HostWorkers workers{[this](std::function<void()> job) { return queue.submit(std::move(job)); },
                        [this](const LayerCall& call) { compute_now(call); }};
    if (mechanism == Mechanism::kMailbox) {
      handoff = std::make_unique<Mailbox>(shape, std::move(workers), stream);
    } else {
      handoff = std::make_unique<HostFunctions>(shape, std::move(workers), stream);
    }
  }
  void submit(Tokens& t) { handoff->submit(0, t.layer, t.count, t.x, t.ids, t.weights); }
  void collect(Tokens& t) { handoff->collect(0, t.layer, t.count, t.out); }
  void enqueue_layers() {
    for (Tokens& t : tokens) {
      submit(t);
      stream.work("shared expert", static_cast<int32_t>(t.layer), 200us);
      collect(t);
    }
  }
  void fill() {
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      tokens[layer].fill(layer, 1 + static_cast<int64_t>(random() % kHandoffTokens), random);
    }
  }
  void step() {
    fill();
    handoff->begin_step(0, kLayers);
    enqueue_layers();
    stream.synchronize();
    handoff->end_step();
  }
  // The message that a step ends with.
  std::string failing_step() {
    try {
      step();
    } catch (const StateError& error) {
      return error.what();
    }
    return "nothing failed";
  }
  void check_sound_step() {
    step();
    for (const Tokens& t : tokens) CHECK(t.right());
  }
};

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void test_every_sum_arrives(Mechanism mechanism) {
  Sides sides(mechanism, kLongTimeout);
  for (int step = 0; step < 60; ++step) sides.check_sound_step();
}

void test_two_submissions_may_wait(Mechanism mechanism) {
  Sides sides(mechanism, kLongTimeout);
  std::vector<Tokens> later(kLayers);
  for (int step = 0; step < 20; ++step) {
    sides.fill();
    for (int64_t layer = 0; layer < kLayers; ++layer) later[layer].fill(layer, 2, sides.random);
    sides.handoff->begin_step(0, 2 * kLayers - 1);
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      sides.submit(sides.tokens[layer]);
      if (layer > 0) sides.collect(later[layer - 1]);
      if (layer + 1 < kLayers) sides.submit(later[layer]);
      sides.collect(sides.tokens[layer]);
    }
    sides.stream.synchronize();
    sides.handoff->end_step();
    for (const Tokens& t : sides.tokens) CHECK(t.right());
    for (int64_t layer = 0; layer + 1 < kLayers; ++layer) CHECK(later[layer].right());
  }
}

void test_a_recorded_step_is_replayed_without_edits(Mechanism mechanism) {
  Sides sides(mechanism, kLongTimeout);
  sides.check_sound_step();
  sides.stream.begin_recording();
  sides.enqueue_layers();  // with no step open, as nothing is done
  sides.stream.end_recording();
  for (int step = 0; step < 30; ++step) {
    std::vector<int64_t> counts;
    for (const Tokens& t : sides.tokens) counts.push_back(t.count);
    for (int64_t l = 0; l < kLayers; ++l) sides.tokens[l].fill(l, counts[l], sides.random);
    sides.handoff->begin_step(0, kLayers);
    sides.stream.replay();
    sides.stream.synchronize();
    sides.handoff->end_step();
    for (const Tokens& t : sides.tokens) CHECK(t.right());
  }
}

void test_what_experts_throw_ends_the_step_and_only_it(Mechanism mechanism) {
  Sides sides(mechanism, kLongTimeout);
  for (int round = 0; round < 3; ++round) {
    sides.check_sound_step();
    sides.compute_now = [round](const LayerCall& call) {
      if (call.layer == 2 && round == 1) throw 7;
      if (call.layer == 2) throw std::runtime_error("no such expert");
      compute(call);
    };
    const std::string message = sides.failing_step();
    CHECK(has(message, "layer slot 2: the host's experts failed: "));
    CHECK(has(message, round == 1 ? "an exception of an unknown kind" : "no such expert"));
    CHECK(sides.tokens[1].right());
    if (mechanism == Mechanism::kMailbox) {
      for (int64_t layer = 2; layer < kLayers; ++layer) CHECK(sides.tokens[layer].zero());
    }
    CHECK_THROWS(StateError, sides.handoff->begin_step(0, kLayers));
    sides.handoff->reset();
    sides.compute_now = compute;
  }
  sides.check_sound_step();
}

void test_a_stall_ends_within_the_timeout(Mechanism mechanism) {
  Sides sides(mechanism, kShortTimeout);
  std::atomic<bool> stalled{true};
  sides.compute_now = [&](const LayerCall& call) {
    if (call.layer != 1) return compute(call);
    while (stalled.load()) std::this_thread::sleep_for(1ms);
  };
  const auto begin = std::chrono::steady_clock::now();
  CHECK(has(sides.failing_step(), "layer slot 1: the host's experts did not answer within 0.04 s"));
  // The layers behind the one that timed out wait no more: five timeouts would be 200 ms.
  CHECK(std::chrono::steady_clock::now() - begin < 4 * kShortTimeout);
  CHECK_THROWS(StateError, sides.handoff->reset());  // the workers are still in it
  CHECK_THROWS(StateError, sides.handoff->begin_step(0, kLayers));
  stalled.store(false);
  sides.handoff->reset();
  sides.compute_now = compute;
  sides.check_sound_step();
}

void test_a_server_that_never_comes_is_a_timeout() {
  Sides sides(Mechanism::kMailbox, kShortTimeout);
  std::atomic<bool> busy{true};
  const Ticket before = sides.queue.submit([&] {
    while (busy.load()) std::this_thread::sleep_for(1ms);
  });
  CHECK(has(sides.failing_step(), "layer slot 0: the host's experts did not answer"));
  busy.store(false);
  sides.handoff->reset();
  sides.check_sound_step();
}

void test_a_forgotten_step_gives_its_thread_back() {
  Sides sides(Mechanism::kMailbox, kLongTimeout, kShortTimeout);
  sides.handoff->begin_step(0, kLayers);
  CHECK(sides.queue.submit([] {})->wait_for(kLongTimeout));
  sides.handoff->reset();
}

void test_another_layers_answer_is_refused() {
  Sides sides(Mechanism::kMailbox, kLongTimeout);
  sides.compute_now = [](const LayerCall& call) {
    compute(call);
    const uint8_t* picks = reinterpret_cast<const uint8_t*>(call.expert_ids);  // behind the words
    auto* slot = reinterpret_cast<MailboxSlot*>(const_cast<uint8_t*>(picks) - sizeof(MailboxSlot));
    if (call.layer == 3) slot->answered_layer = 2;
  };
  CHECK(has(sides.failing_step(), "layer slot 3: the host's experts answered for another layer"));
  sides.handoff->reset();
  sides.compute_now = compute;
  sides.check_sound_step();
}

void test_a_step_that_is_left_half_way_can_be_reset(Mechanism mechanism) {
  Sides sides(mechanism, kLongTimeout);
  for (int submissions = 0; submissions < 4; ++submissions) {
    sides.fill();
    sides.handoff->begin_step(0, kLayers);
    for (int i = 0; i < submissions; ++i) sides.submit(sides.tokens[i]);
    if (submissions > 2) sides.collect(sides.tokens[0]);
    sides.handoff->reset();
    sides.check_sound_step();
  }
}

void test_a_step_shorter_than_announced_is_an_error(Mechanism mechanism) {
  Sides sides(mechanism, kShortTimeout);
  sides.fill();
  sides.handoff->begin_step(0, 2);
  sides.submit(sides.tokens[0]);
  sides.collect(sides.tokens[0]);
  sides.stream.synchronize();
  CHECK_THROWS(StateError, sides.handoff->end_step());
  sides.handoff->reset();
  sides.check_sound_step();
}

void test_an_open_step_does_not_keep_the_end_waiting(Mechanism mechanism) {
  Sides sides(mechanism, kLongTimeout);
  sides.fill();
  sides.handoff->begin_step(0, kLayers);
  sides.submit(sides.tokens[0]);
  sides.handoff.reset();
}

void test_misuse_is_refused_where_it_happens(Mechanism mechanism) {
  Sides sides(mechanism, kLongTimeout);
  sides.fill();
  Tokens& t = sides.tokens[0];
  Handoff& handoff = *sides.handoff;
  CHECK_THROWS(StateError, sides.submit(t));  // no step
  CHECK_THROWS(StateError, handoff.end_step());
  handoff.begin_step(0, kLayers);
  CHECK_THROWS(StateError, handoff.begin_step(0, kLayers));
  CHECK_THROWS(StateError, sides.collect(t));  // nothing submitted
  CHECK_THROWS(std::invalid_argument, handoff.submit(0, kLayers, 1, t.x, t.ids, t.weights));
  CHECK_THROWS(std::invalid_argument, handoff.submit(0, -1, 1, t.x, t.ids, t.weights));
  CHECK_THROWS(std::invalid_argument, handoff.submit(0, 0, 9, t.x, t.ids, t.weights));
  CHECK_THROWS(std::invalid_argument, handoff.submit(0, 0, 0, t.x, t.ids, t.weights));
  CHECK_THROWS(std::invalid_argument, handoff.submit(0, 0, 1, t.x + 1, t.ids, t.weights));
  for (uint64_t i = 0; i < kHandoffSlots; ++i) sides.submit(sides.tokens[i]);
  CHECK_THROWS(StateError, sides.submit(sides.tokens[4]));   // no slot left
  CHECK_THROWS(StateError, sides.collect(sides.tokens[1]));  // not the oldest
  handoff.reset();
  sides.check_sound_step();
}

void test_the_device_works_while_the_experts_do(Mechanism mechanism) {
  Sides sides(mechanism, kLongTimeout);
  // The experts of a layer end only once the shared expert has begun: in turns they never would.
  std::atomic<int> begun{0};
  sides.compute_now = [&](const LayerCall& call) {
    while (begun.load() <= call.layer) std::this_thread::yield();
    compute(call);
  };
  sides.stream.log().record(true);
  sides.fill();
  sides.handoff->begin_step(0, kLayers);
  for (Tokens& t : sides.tokens) {
    sides.submit(t);
    sides.stream.call_host(
        0, [](void* count) { ++*static_cast<std::atomic<int>*>(count); }, &begun);
    sides.collect(t);
  }
  sides.stream.synchronize();
  sides.handoff->end_step();
  const std::vector<Event> events = sides.stream.log().take();
  const std::vector<std::string> order = {"publish", "experts begin", "experts end", "await ends"};
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    CHECK(sides.tokens[layer].right());
    size_t next = 0;
    for (const Event& event : events) {
      if (event.layer == layer && next < order.size() && event.name == order[next]) ++next;
    }
    CHECK(next == order.size());
  }
}

// Faults of the protocol itself, which the host's checks keep from happening.
void test_the_kernels_refuse_what_would_break_the_protocol() {
  EventLog log;
  alignas(kMailboxLineBytes) static uint8_t memory[4 * 1024];
  MailboxState state{};
  MailboxReport report{};
  Tokens t;
  std::mt19937 random(3);
  t.fill(1, 1, random);
  const PublishArguments publish{memory, &state,      &report, t.x, t.ids,     t.weights, 1024, 4,
                                 512,    kHidden * 4, 256,     384, kTopK * 4, 1,         1};
  const AwaitArguments await{memory, &state, &report, t.out, 1024, 4, 1000000, 768, kHidden * 4, 1};
  MailboxSlot& slot = *reinterpret_cast<MailboxSlot*>(memory + 3 * 1024);
  const auto failed_with = [&](int32_t code) {
    const bool told = state.failed == static_cast<uint32_t>(code) && report.code == code;
    begin_twin({&state, 7});
    report = {};
    return told;
  };
  begin_twin({&state, 7});
  await_twin(await, log);
  CHECK(failed_with(kNotPublished) && t.zero());
  for (int i = 0; i < 5; ++i) publish_twin(publish, log);
  CHECK(slot.published.load() == 7);
  CHECK(failed_with(kRingFull));
  publish_twin(publish, log);
  slot.answered.store(11);
  await_twin(await, log);
  CHECK(failed_with(kOverwritten));
  slot.answered.store(6);
  publish_twin(publish, log);
  await_twin(await, log);
  CHECK(failed_with(kTimedOut));
}

void test_waiting_for_a_job_ends_in_time() {
  JobQueue queue([] {}, 50us, 50us);
  std::atomic<bool> go{false};
  const Ticket ticket = queue.submit([&] {
    while (!go.load()) std::this_thread::yield();
    throw std::runtime_error("not thrown by wait_for");
  });
  CHECK(!ticket->wait_for(2ms));
  go.store(true);
  CHECK(ticket->wait_for(20s));
  CHECK(ticket->wait_for(0ns));
}

// A driver that does at once what it is asked for, and remembers how it was asked.
namespace driver {

EventLog log;
void* entered = nullptr;
int loaded = 0;
int refusal = 0;  // what allocations and launches answer
std::vector<unsigned> block_sizes;

int begin_kernel, publish_kernel, await_kernel;  // their addresses are the functions

int get_function(CudaFunction* function, CudaModule, const char* name) {
  const std::string asked = name;
  *function = asked == "hybridk2_begin"     ? &begin_kernel
              : asked == "hybridk2_publish" ? &publish_kernel
                                            : &await_kernel;
  return 0;
}

int launch(CudaFunction kernel, unsigned x, unsigned y, unsigned z, unsigned block, unsigned,
           unsigned, unsigned, CudaStreamHandle stream, void** parameters, void**) {
  if (refusal != 0) return refusal;
  CHECK(x == 1 && y == 1 && z == 1 && entered != nullptr);
  CHECK(stream == reinterpret_cast<CudaStreamHandle>(0x77));
  block_sizes.push_back(block);
  if (kernel == &begin_kernel) begin_twin(*static_cast<BeginArguments*>(parameters[0]));
  if (kernel == &publish_kernel) publish_twin(*static_cast<PublishArguments*>(parameters[0]), log);
  if (kernel == &await_kernel) await_twin(*static_cast<AwaitArguments*>(parameters[0]), log);
  return 0;
}

const CudaDriver kTable{
    [](unsigned) { return 0; },
    [](CudaResult, const char** name) { return *name = "CUDA_ERROR_OF_THE_TEST", 0; },
    [](CudaDevice* device, int ordinal) { return *device = ordinal, 0; },
    [](CudaContext* context, CudaDevice) { return *context = &entered, 0; },
    [](CudaDevice) { return 0; },
    [](CudaContext* context) { return *context = entered, 0; },
    [](CudaContext context) { return entered = context, 0; },
    [] { return 0; },
    [](CudaModule* module, const void* image) {
      return *module = const_cast<void*>(image), ++loaded, 0;
    },
    [](CudaModule) { return --loaded, 0; },
    &get_function,
    &launch,
    [](CudaStreamHandle, CudaHostFunction function, void* data) { return function(data), 0; },
    [](void** memory, size_t bytes, unsigned) {
      if (refusal == 0) *memory = std::aligned_alloc(kMailboxLineBytes, bytes);
      return refusal;
    },
    [](void* memory) { return std::free(memory), 0; },
    [](void*, size_t, unsigned) { return 0; },
    [](void*) { return 0; },
    [](CudaAddress* memory, size_t bytes) {
      *memory = reinterpret_cast<CudaAddress>(std::aligned_alloc(kMailboxLineBytes, bytes));
      return 0;
    },
    [](CudaAddress memory) { return std::free(reinterpret_cast<void*>(memory)), 0; },
    [](CudaAddress memory, unsigned char value, size_t bytes) {
      return std::memset(reinterpret_cast<void*>(memory), value, bytes), 0;
    },
    [](CudaAddress to, CudaAddress from, size_t bytes, CudaStreamHandle) {
      std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
      return 0;
    },
    [](CudaStreamHandle, int* status) { return *status = 0, 0; },
};

}  // namespace driver

template <typename Mechanism>
void test_a_cards_stream_asks_its_driver_for_the_same() {
  JobQueue queue([] {}, 50us, 50us);
  const HostWorkers workers{
      [&queue](std::function<void()> job) { return queue.submit(std::move(job)); }, compute};
  const HandoffShape shape{kLayers, kHidden, kTopK, Precision::kFp32, kLongTimeout, kLongTimeout};
  std::mt19937 random(1);
  driver::block_sizes.clear();
  {
    CudaStream stream(0, driver::kTable);
    CHECK(driver::loaded == 1);
    driver::entered = nullptr;  // another thread, which has not computed on the card yet
    Mechanism handoff(shape, workers, stream);
    handoff.begin_step(0x77, kLayers);
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      Tokens t;
      t.fill(layer, 1 + layer, random);
      handoff.submit(0x77, layer, t.count, t.x, t.ids, t.weights);
      handoff.collect(0x77, layer, t.count, t.out);
      CHECK(t.right());
    }
    handoff.end_step();
    driver::refusal = 700;
    CHECK_THROWS(StateError, stream.begin(0x77, {nullptr, 0}));
    CHECK_THROWS(StateError, stream.allocate_host(128));
    driver::refusal = 2;
    CHECK_THROWS(OutOfMemoryError, stream.allocate_host(128));
    driver::refusal = 0;
  }
  CHECK(driver::loaded == 0);
  if (std::is_same_v<Mechanism, Mailbox>) {
    CHECK(driver::block_sizes.size() == 1 + 2 * kLayers);
    for (size_t i = 0; i < driver::block_sizes.size(); ++i) {
      CHECK(driver::block_sizes[i] == (i == 0 ? 1 : kMailboxThreads));
    }
  }
}

}  // namespace

int main() {
  for (const Mechanism mechanism : {Mechanism::kMailbox, Mechanism::kHostFunctions}) {
    test_every_sum_arrives(mechanism);
    test_two_submissions_may_wait(mechanism);
    test_a_recorded_step_is_replayed_without_edits(mechanism);
    test_what_experts_throw_ends_the_step_and_only_it(mechanism);
    test_a_stall_ends_within_the_timeout(mechanism);
    test_a_step_that_is_left_half_way_can_be_reset(mechanism);
    test_a_step_shorter_than_announced_is_an_error(mechanism);
    test_an_open_step_does_not_keep_the_end_waiting(mechanism);
    test_misuse_is_refused_where_it_happens(mechanism);
    test_the_device_works_while_the_experts_do(mechanism);
  }
  test_a_server_that_never_comes_is_a_timeout();
  test_a_forgotten_step_gives_its_thread_back();
  test_another_layers_answer_is_refused();
  test_the_kernels_refuse_what_would_break_the_protocol();
  test_waiting_for_a_job_ends_in_time();
  test_a_cards_stream_asks_its_driver_for_the_same<Mailbox>();
  test_a_cards_stream_asks_its_driver_for_the_same<HostFunctions>();
  std::printf("%s\n", failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
