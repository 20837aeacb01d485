#include "experts.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "errors.h"
#include "read_roof.h"

namespace hybridk2 {
namespace {

enum LoadState : uint8_t { kEmpty, kLoading, kLoaded };

int checked_threads(int threads, const std::vector<Node>& nodes) {
  constexpr int kMost = 4096;
  if (threads < 0 || threads > kMost) {
    throw std::invalid_argument("threads: expected 1 to " + std::to_string(kMost) + ", found " +
                                std::to_string(threads));
  }
  return threads > 0 ? threads : cores_of(nodes);
}

// Numbers [0, total) for each node, claimed in shares by the node's threads: one that is
// interrupted does not hold up all.
class Shares {
 public:
  explicit Shares(int nodes) : next_(nodes) {}
  bool claim(int node, int64_t total, int64_t count, int64_t* begin) {
    *begin = next_[node].value.fetch_add(count);
    return *begin < total;
  }

 private:
  struct alignas(kCacheLineBytes) Next {
    std::atomic<int64_t> value{0};
  };
  std::vector<Next> next_;
};

}  // namespace

Experts::Experts(const ExpertsShape& shape, const std::string& isa, int threads, bool huge_pages,
                 const std::vector<Node>& nodes, const std::vector<bool>& elsewhere,
                 bool spins_when_idle) try
    : kernels_(select_kernels(isa)),
      plan_(plan_threads(nodes, checked_threads(threads, nodes))),
      process_(getpid()),
      weights_(shape, plan_, huge_pages, elsewhere),
      load_states_(new std::atomic<uint8_t>[shape.num_layers * shape.num_experts]()),
      pool_(plan_, spins_when_idle),
      runner_(weights_, kernels_, pool_, plan_, huge_pages),
      queue_([this] { pool_.adopt_this_thread(); }, pool_.idle_spin(), pool_.waiter_spin()) {
  try_gigabyte_pages();
} catch (const std::system_error& error) {
  throw ConfigurationError(std::string("the system refused to start the threads: ") + error.what() +
                           "; ask for fewer, or raise the limits on processes and memory");
}

// By every thread, even when there are none to try: then all are known to be up and pinned.
void Experts::try_gigabyte_pages() {
  Shares shares(pool_.nodes());
  const auto try_pages = [&](int, int worker) {
    const int node = pool_.node_of(worker);
    Arena& arena = weights_.arena(node);
    const int64_t total = static_cast<int64_t>(arena.gigabytes_to_try());
    for (int64_t page; shares.claim(node, total, 1, &page);) arena.try_gigabyte_page(page);
  };
  queue_.submit([&] { pool_.run(1, try_pages, false); })->wait();
}

int Experts::gigabyte_pages() const {
  int pages = 0;
  for (int node = 0; node < weights_.nodes(); ++node) {
    pages += weights_.arena(node).gigabyte_pages();
  }
  return pages;
}

std::vector<std::string> Experts::troubles() const {
  std::vector<std::string> troubles;
  const auto add = [&](const std::string& trouble) {
    if (!trouble.empty()) troubles.push_back(trouble);
  };
  add(plan_.trouble);
  for (int node = 0; node < weights_.nodes(); ++node) add(weights_.arena(node).trouble());
  int64_t not_taken = -gigabyte_pages();
  for (int node = 0; node < weights_.nodes(); ++node) {
    not_taken += static_cast<int64_t>(weights_.arena(node).gigabytes_to_try());
  }
  if (not_taken > 0) {
    add(std::to_string(not_taken) + " reserved pages of 1 GB could not be taken (Linux before " +
        "5.14, another program, or a limit); 2 MB pages are in their place");
  }
  if (pool_.unpinned() > 0) {
    add("the system refused to pin " + std::to_string(pool_.unpinned()) + " of " +
        std::to_string(threads()) + " threads to their CPUs, which is slower");
  }
  return troubles;
}

bool Experts::belongs_to_this_process() const { return getpid() == process_; }

void Experts::check_process() const {
  if (belongs_to_this_process()) return;
  throw StateError(
      "these experts belong to the parent process; create them after fork, not before");
}

void Experts::check_location(int64_t layer, int64_t expert) const {
  if (layer < 0 || layer >= weights_.shape().num_layers) {
    throw std::invalid_argument("layer slot " + std::to_string(layer) + ": expected 0 to " +
                                std::to_string(weights_.shape().num_layers - 1));
  }
  if (expert < 0 || expert >= weights_.shape().num_experts) {
    throw std::invalid_argument("expert " + std::to_string(expert) + ": expected 0 to " +
                                std::to_string(weights_.shape().num_experts - 1));
  }
}

std::atomic<uint8_t>& Experts::load_state(int64_t layer, int64_t expert) const {
  return load_states_[layer * weights_.shape().num_experts + expert];
}

void Experts::load(int64_t layer, int64_t expert, const ExpertMatrices& matrices) {
  check_process();
  check_location(layer, expert);
  if (weights_.is_elsewhere(layer, expert)) {
    throw StateError("layer slot " + std::to_string(layer) + ", expert " + std::to_string(expert) +
                     " is kept elsewhere and has no memory here");
  }
  uint8_t expected = kEmpty;
  if (!load_state(layer, expert).compare_exchange_strong(expected, kLoading)) {
    throw StateError("layer slot " + std::to_string(layer) + ", expert " + std::to_string(expert) +
                     " was loaded before");
  }
  if (pool_.nodes() == 1) {
    weights_.pack(0, layer, expert, matrices, 0, weights_.slice(0).strips());
  } else {
    pack_on_nodes(layer, expert, matrices);
  }
  load_state(layer, expert).store(kLoaded, std::memory_order_release);
}

void Experts::pack_on_nodes(int64_t layer, int64_t expert, const ExpertMatrices& matrices) {
  constexpr int64_t kStripsPerShare = 4;
  Shares shares(pool_.nodes());
  const auto pack_shares = [&](int, int worker) {
    const int node = pool_.node_of(worker);
    const int64_t strips = weights_.slice(node).strips();
    for (int64_t begin; shares.claim(node, strips, kStripsPerShare, &begin);) {
      weights_.pack(node, layer, expert, matrices, begin,
                    std::min(begin + kStripsPerShare, strips));
    }
  };
  queue_.submit([&] { pool_.run(1, pack_shares, false); })->wait();
}

void Experts::check_loaded(int64_t layer, int64_t expert) const {
  check_location(layer, expert);
  if (load_state(layer, expert).load(std::memory_order_acquire) == kLoaded) return;
  throw StateError("layer slot " + std::to_string(layer) + ", expert " + std::to_string(expert) +
                   " is not loaded");
}

std::vector<ExpertRegion> Experts::regions(int64_t layer, int64_t expert) const {
  check_process();
  check_loaded(layer, expert);
  return weights_.regions(layer, expert);
}

void Experts::dequantise(int64_t layer, int64_t expert, float* gate, float* up, float* down) const {
  check_loaded(layer, expert);
  weights_.unpack(layer, expert, gate, up, down);
}

void Experts::check_call(const LayerCall& call) const {
  check_process();
  if (call.num_tokens < 0 || call.top_k < 0) {
    throw std::invalid_argument("tokens and top_k must not be negative");
  }
  check_location(call.layer, 0);
  for (int64_t i = 0; i < call.num_tokens * call.top_k; ++i) {
    const int32_t expert = call.expert_ids[i];
    if (expert == -1) continue;
    if (expert < 0 || expert >= weights_.shape().num_experts) {
      throw std::invalid_argument("token " + std::to_string(i / call.top_k) + ": expert id " +
                                  std::to_string(expert) + ", expected -1 to " +
                                  std::to_string(weights_.shape().num_experts - 1));
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
  return queue_.submit([this, call] { runner_.run(call); });
}

Ticket Experts::enqueue(std::function<void()> job) {
  check_process();
  return queue_.submit(std::move(job));
}

void Experts::compute(const LayerCall& call) {
  check_call(call);
  runner_.run(call);
}

double Experts::read_weights_seconds(int loop) {
  check_process();
  if (loop < 0 || loop >= kNumReadLoops) throw std::invalid_argument("no such read loop");
  double seconds = 0;
  const Ticket ticket = queue_.submit([this, loop, &seconds] {
    constexpr int64_t kShareBytes = int64_t{1} << 20;
    Shares shares(pool_.nodes());
    std::atomic<uint64_t> seen{0};
    const auto begin = std::chrono::steady_clock::now();
    const auto read_shares = [&](int, int worker) {
      const int node = pool_.node_of(worker);
      const Arena& arena = weights_.arena(node);
      const int64_t whole_shares = static_cast<int64_t>(arena.bytes()) / kShareBytes * kShareBytes;
      for (int64_t at; shares.claim(node, whole_shares, kShareBytes, &at);) {
        seen.fetch_xor(read_all(loop, arena.data() + at, kShareBytes));
      }
    };
    pool_.run(1, read_shares, false);
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  });
  ticket->wait();
  return seconds;
}

double Experts::arithmetic_roof(Precision precision) {
  check_process();
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
