#include "experts.h"

#include <unistd.h>

#include <chrono>
#include <initializer_list>
#include <stdexcept>

#include "errors.h"
#include "read_roof.h"

namespace hybridk2 {
namespace {

enum LoadState : uint8_t { kEmpty, kLoading, kLoaded };

int64_t multiply_or_throw(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) {
      throw std::invalid_argument("the experts' weights exceed 2^63 bytes");
    }
  }
  return product;
}

const ExpertsShape& checked(const ExpertsShape& shape) {
  const auto require = [](bool holds, const char* name, const char* rule, int64_t found) {
    if (holds) return;
    throw std::invalid_argument(std::string(name) + ": expected " + rule + ", found " +
                                std::to_string(found));
  };
  constexpr int64_t kMost = int64_t{1} << 24;
  const auto positive = [&](const char* name, int64_t value) {
    require(value >= 1 && value <= kMost, name, "1 to 16777216", value);
  };
  positive("num_layers", shape.num_layers);
  positive("num_experts", shape.num_experts);
  positive("hidden", shape.hidden);
  positive("intermediate", shape.intermediate);
  require(shape.hidden % kGroupColumns == 0, "hidden", "a multiple of 32", shape.hidden);
  require(shape.intermediate % kGroupColumns == 0, "intermediate", "a multiple of 32",
          shape.intermediate);
  return shape;
}

int checked_threads(int threads) {
  constexpr int kMost = 4096;
  if (threads < 0 || threads > kMost) {
    throw std::invalid_argument("threads: expected 1 to " + std::to_string(kMost) + ", found " +
                                std::to_string(threads));
  }
  return threads > 0 ? threads : usable_cores();
}

ExpertBytes bytes_of_expert(const ExpertsShape& shape) {
  ExpertBytes bytes;
  bytes.gate_up =
      multiply_or_throw({strips_of_gate_up(shape), blocks_of(shape.hidden), kStripBlockBytes});
  bytes.total =
      bytes.gate_up +
      multiply_or_throw({strips_of_down(shape), blocks_of(shape.intermediate), kStripBlockBytes});
  return bytes;
}

}  // namespace

Experts::Experts(const ExpertsShape& shape, const std::string& isa, int threads, bool huge_pages)
    : shape_(checked(shape)),
      kernels_(select_kernels(isa)),
      expert_bytes_(bytes_of_expert(shape)),
      process_(getpid()),
      weights_("the routed experts' weights",
               multiply_or_throw({shape.num_layers, shape.num_experts, expert_bytes_.total}),
               huge_pages),
      load_states_(new std::atomic<uint8_t>[shape.num_layers * shape.num_experts]()),
      pool_(checked_threads(threads)),
      runner_(shape_, expert_bytes_, kernels_, pool_, huge_pages),
      queue_([this] { pool_.adopt_this_thread(); }, pool_.spin(), pool_.waiter_spin()) {}

bool Experts::belongs_to_this_process() const { return getpid() == process_; }

void Experts::check_location(int64_t layer, int64_t expert) const {
  if (layer < 0 || layer >= shape_.num_layers) {
    throw std::invalid_argument("layer slot " + std::to_string(layer) + ": expected 0 to " +
                                std::to_string(shape_.num_layers - 1));
  }
  if (expert < 0 || expert >= shape_.num_experts) {
    throw std::invalid_argument("expert " + std::to_string(expert) + ": expected 0 to " +
                                std::to_string(shape_.num_experts - 1));
  }
}

uint8_t* Experts::expert_data(int64_t layer, int64_t expert) const {
  return weights_.data() + (layer * shape_.num_experts + expert) * expert_bytes_.total;
}

std::atomic<uint8_t>& Experts::load_state(int64_t layer, int64_t expert) const {
  return load_states_[layer * shape_.num_experts + expert];
}

void Experts::load(int64_t layer, int64_t expert, const ExpertMatrices& matrices) {
  check_location(layer, expert);
  uint8_t expected = kEmpty;
  if (!load_state(layer, expert).compare_exchange_strong(expected, kLoading)) {
    throw StateError("layer slot " + std::to_string(layer) + ", expert " + std::to_string(expert) +
                     " was loaded before");
  }
  uint8_t* data = expert_data(layer, expert);
  pack_strips({matrices.gate, 0, kPanelRows}, {matrices.up, 0, kPanelRows},
              strips_of_gate_up(shape_), shape_.hidden, data);
  pack_strips({matrices.down, 0, kStripRows}, {matrices.down, kPanelRows, kStripRows},
              strips_of_down(shape_), shape_.intermediate, data + expert_bytes_.gate_up);
  load_state(layer, expert).store(kLoaded, std::memory_order_release);
}

void Experts::dequantise(int64_t layer, int64_t expert, float* gate, float* up, float* down) const {
  check_location(layer, expert);
  if (load_state(layer, expert).load(std::memory_order_acquire) != kLoaded) {
    throw StateError("layer slot " + std::to_string(layer) + ", expert " + std::to_string(expert) +
                     " is not loaded");
  }
  const uint8_t* data = expert_data(layer, expert);
  unpack_strips(data, 0, strips_of_gate_up(shape_), shape_.hidden, {gate, 0, kPanelRows});
  unpack_strips(data, 1, strips_of_gate_up(shape_), shape_.hidden, {up, 0, kPanelRows});
  for (int panel = 0; panel < 2; ++panel) {
    unpack_strips(data + expert_bytes_.gate_up, panel, strips_of_down(shape_), shape_.intermediate,
                  {down, panel * kPanelRows, kStripRows});
  }
}

void Experts::check_call(const LayerCall& call) const {
  if (!belongs_to_this_process()) {
    throw StateError(
        "these experts belong to the parent process; create them after fork, not before");
  }
  if (call.num_tokens < 0 || call.top_k < 0) {
    throw std::invalid_argument("tokens and top_k must not be negative");
  }
  check_location(call.layer, 0);
  for (int64_t i = 0; i < call.num_tokens * call.top_k; ++i) {
    const int32_t expert = call.expert_ids[i];
    if (expert == -1) continue;
    if (expert < 0 || expert >= shape_.num_experts) {
      throw std::invalid_argument("token " + std::to_string(i / call.top_k) + ": expert id " +
                                  std::to_string(expert) + ", expected -1 to " +
                                  std::to_string(shape_.num_experts - 1));
    }
    if (load_state(call.layer, expert).load(std::memory_order_acquire) != kLoaded) {
      throw StateError("token " + std::to_string(i / call.top_k) + ": layer slot " +
                       std::to_string(call.layer) + ", expert " + std::to_string(expert) +
                       " is not loaded");
    }
  }
}

Ticket Experts::submit(const LayerCall& call) {
  check_call(call);
  return queue_.submit([this, call] { runner_.run(call, expert_data(call.layer, 0)); });
}

double Experts::read_weights_seconds(int loop) {
  if (loop < 0 || loop >= kNumReadLoops) throw std::invalid_argument("no such read loop");
  double seconds = 0;
  const Ticket ticket = queue_.submit([this, loop, &seconds] {
    // Shares are claimed like those of a layer: a thread that is interrupted does not hold up all.
    constexpr size_t kShareBytes = size_t{1} << 20;
    std::atomic<size_t> next{0};
    std::atomic<uint64_t> seen{0};
    const auto begin = std::chrono::steady_clock::now();
    const auto read_shares = [&](int, int) {
      for (size_t at; (at = next.fetch_add(kShareBytes)) + kShareBytes <= weights_.bytes();) {
        seen.fetch_xor(read_all(loop, weights_.data() + at, kShareBytes));
      }
    };
    pool_.run(1, read_shares, false);
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  });
  ticket->wait();
  return seconds;
}

double Experts::arithmetic_roof(Precision precision) {
  const ActivationKernels& kernels =
      precision == Precision::kBf16 ? *kernels_.bf16 : *kernels_.fp32;
  if (kernels.arithmetic_roof == nullptr) return 0;
  double flop_per_second = 0;
  const Ticket ticket = queue_.submit([&] {
    // Small shares, claimed: a thread that is interrupted does not hold up all.
    constexpr int64_t kShares = 512;
    constexpr int64_t kRoundsPerShare = 2000;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> flop{0};
    const auto multiply = [&](int, int) {
      alignas(kLineBytes) const uint8_t line[kLineBytes] = {};
      alignas(kLineBytes) float sums[kArithmeticSums] = {};
      const uint32_t element = 0x3f803f80;  // ones, in fp32 (nearly) and in bf16
      while (next.fetch_add(1) < kShares) {
        flop.fetch_add(kernels.arithmetic_roof({line, &element, sums, kRoundsPerShare}));
      }
    };
    const auto begin = std::chrono::steady_clock::now();
    pool_.run(1, multiply, false);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    flop_per_second = static_cast<double>(flop.load()) / seconds.count();
  });
  ticket->wait();
  return flop_per_second;
}

}  // namespace hybridk2
