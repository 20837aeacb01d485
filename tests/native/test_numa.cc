// NUMA without NUMA hardware. Which threads and weights go to which node, on machines described by
// made-up folders; that no thread reads weights of another node, by kernels that note who read what
// where; that memory is bound to a node if the system lets us, and said if not.
#include <linux/mempolicy.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "experts.h"
#include "layer_runner.h"
#include "thread_pool.h"
#include "weights.h"

using namespace hybridk2;

namespace {

// Usual nodes of so many cores each, without siblings. Their CPUs need not exist: nobody runs.
std::vector<Node> nodes_of(const std::vector<int>& cores) {
  std::vector<Node> nodes;
  int cpu = 0;
  for (size_t n = 0; n < cores.size(); ++n) {
    Node node{static_cast<int>(n), {}, cores[n]};
    for (int c = 0; c < cores[n]; ++c) node.cpus.push_back(cpu++);
    nodes.push_back(node);
  }
  return nodes;
}

void test_threads_are_dealt_in_proportion_to_cores() {
  const auto dealt = [](const std::vector<int>& cores, int threads) {
    return plan_threads(nodes_of(cores), threads).threads_of_node;
  };
  CHECK((dealt({8, 8}, 16) == std::vector{8, 8}));
  CHECK((dealt({8, 8}, 7) == std::vector{4, 3}));
  CHECK((dealt({8, 4, 2}, 14) == std::vector{8, 4, 2}));
  CHECK((dealt({8, 4, 2}, 7) == std::vector{4, 2, 1}));
  CHECK((dealt({8, 4, 2}, 3) == std::vector{1, 1, 1}));
  CHECK((dealt({2, 2, 2, 2, 2, 2}, 13) == std::vector{3, 2, 2, 2, 2, 2}));
  for (int threads = 3; threads <= 70; ++threads) {
    const std::vector<int> cores = {32, 7, 31};
    const std::vector<int> counts = dealt(cores, threads);
    for (size_t n = 0; n < cores.size(); ++n) CHECK(1 <= counts[n] && counts[n] <= cores[n]);
    CHECK(counts[0] + counts[1] + counts[2] == threads);
  }
}

void test_workers_run_on_their_node_alone_if_there_are_cpus_enough() {
  const ThreadPlan fits = plan_threads(nodes_of({3, 2}), 4);
  CHECK(fits.a_cpu_each && fits.cpus_to_spare && fits.trouble.empty());
  std::set<int> used;
  for (const WorkerPlace& place : fits.workers) {
    CHECK(place.cpus.size() == 1 && used.insert(place.cpus[0]).second);
    CHECK((place.cpus[0] < 3) == (place.node == 0));
  }
  CHECK(!plan_threads(nodes_of({3, 2}), 5).cpus_to_spare);

  const ThreadPlan crowded = plan_threads(nodes_of({3, 2}), 9);
  CHECK(!crowded.a_cpu_each && !crowded.cpus_to_spare);
  for (const WorkerPlace& place : crowded.workers) {
    CHECK(place.cpus == crowded.nodes[place.node].cpus);
  }

  const ThreadPlan few = plan_threads(nodes_of({3, 2, 2}), 2);
  CHECK(few.nodes.size() == 1 && few.nodes[0].number == kAnyNode && few.nodes[0].cores == 7);
  CHECK(few.trouble.find("3 NUMA nodes") != std::string::npos);
}

// A folder as the kernel shows nodes, with these CPU lists.
class FakeSystem {
 public:
  explicit FakeSystem(const std::map<int, std::string>& cpu_lists) {
    std::string name = std::filesystem::temp_directory_path() / "hybridk2-nodes-XXXXXX";
    folder_ = mkdtemp(name.data());
    for (const auto& [number, list] : cpu_lists) {
      const std::filesystem::path node = folder_ / "node" / ("node" + std::to_string(number));
      std::filesystem::create_directories(node);
      std::ofstream(node / "cpulist") << list << "\n";
    }
    std::filesystem::create_directories(folder_ / "node" / "power");
  }
  ~FakeSystem() { std::filesystem::remove_all(folder_); }
  std::string folder() const { return folder_; }

 private:
  std::filesystem::path folder_;
};

void test_nodes_are_those_whose_cpus_we_may_use() {
  cpu_set_t before, one;
  CHECK(sched_getaffinity(0, sizeof(before), &before) == 0);
  std::vector<int> allowed;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &before)) allowed.push_back(cpu);
  }
  if (allowed.size() < 2) {
    std::printf("skipped: one CPU, which cannot be on two nodes\n");
    return;
  }
  const int first = allowed[0];
  std::string others = "9000";  // and one that this machine does not have
  for (size_t i = 1; i < allowed.size(); ++i) others += "," + std::to_string(allowed[i]);
  const FakeSystem two({{0, std::to_string(first)}, {2, others}, {3, ""}, {5, "9001-9003"}});
  const std::vector<Node> nodes = usable_nodes(two.folder());
  CHECK(nodes.size() == 2);
  CHECK(nodes[0].number == 0 && nodes[0].cpus == std::vector{first});
  CHECK(nodes[1].number == 2 && nodes[1].cpus.size() == allowed.size() - 1);

  CPU_ZERO(&one);
  CPU_SET(first, &one);
  CHECK(sched_setaffinity(0, sizeof(one), &one) == 0);
  const std::vector<Node> left = usable_nodes(two.folder());
  CHECK(left.size() == 1 && left[0].number == kAnyNode && left[0].cpus == std::vector{first});
  CHECK(sched_setaffinity(0, sizeof(before), &before) == 0);

  const FakeSystem none({});
  CHECK(usable_nodes(none.folder()).size() == 1);
  CHECK(cores_of(usable_nodes(none.folder())) == static_cast<int>(allowed.size()));
}

// Made-up experts of any bits: only where they lie matters.
struct Expert {
  std::vector<uint32_t> words;
  std::vector<uint16_t> scales;

  explicit Expert(const ExpertsShape& shape)
      : words(shape.hidden * shape.intermediate / 8),
        scales(shape.hidden * shape.intermediate / 32, 0x3c00) {
    std::mt19937 random(5);
    for (uint32_t& word : words) word = random();
  }
  ExpertMatrices matrices() const {
    const PackedMatrix matrix{words.data(), scales.data()};
    return {matrix, matrix, matrix};
  }
};

void test_slices_cover_every_strip_once_and_waste_nothing() {
  const std::vector<std::vector<int>> machines = {
      {1}, {1, 1}, {1, 1, 1}, {2, 1, 3}, {1, 1, 1, 1, 1, 1}};
  const std::vector<ExpertsShape> shapes = {{2, 3, 7168, 2048}, {1, 2, 96, 160}, {1, 1, 32, 32}};
  for (const std::vector<int>& cores : machines) {
    for (const ExpertsShape& shape : shapes) {
      int threads = 0;
      for (const int count : cores) threads += count;
      std::vector<Node> nodes = nodes_of(cores);
      for (Node& node : nodes) node.number = kAnyNode;
      const ThreadPlan plan = plan_threads(nodes, threads);
      const Weights weights(shape, plan, false);
      StripRange gate_up{0, 0}, down{0, 0};
      for (int node = 0; node < weights.nodes(); ++node) {
        const ExpertSlice& slice = weights.slice(node);
        CHECK(slice.gate_up.first == gate_up.first && slice.down.first == down.first);
        gate_up.first += slice.gate_up.count;
        down.first += slice.down.count;
        const double share = plan.threads_of_node[node] / static_cast<double>(threads);
        CHECK(std::abs(slice.gate_up.count - share * strips_of_gate_up(shape)) <= 1);
        CHECK(std::abs(slice.down.count - share * strips_of_down(shape)) <= 1);
      }
      CHECK(gate_up.first == strips_of_gate_up(shape));
      CHECK(down.first == strips_of_down(shape));
      const int64_t blocks =
          gate_up.first * blocks_of(shape.hidden) + down.first * blocks_of(shape.intermediate);
      CHECK(weights.bytes() == shape.num_layers * shape.num_experts * blocks * kStripBlockBytes);
    }
  }
}

void test_regions_are_the_expert_of_one_node_and_those_elsewhere_take_nothing() {
  const ExpertsShape shape{2, 3, 96, 160};
  const Expert made(shape);
  std::vector<uint8_t> whole(expert_bytes(shape));
  pack_expert(shape, made.matrices(), whole.data());
  const std::vector<bool> elsewhere = {true, false, false, false, true, false};
  for (const std::vector<int>& cores : {std::vector{1}, {1, 1}, {2, 1, 3}, {1, 1, 1, 1, 1, 1}}) {
    int threads = 0;
    for (const int count : cores) threads += count;
    std::vector<Node> nodes = nodes_of(cores);
    for (Node& node : nodes) node.number = kAnyNode;
    const Weights weights(shape, plan_threads(nodes, threads), false, elsewhere);
    CHECK(weights.bytes() == 4 * expert_bytes(shape));
    for (int i = 0; i < 6; ++i) {
      const int64_t layer = i / 3, expert = i % 3;
      CHECK(weights.is_elsewhere(layer, expert) == elsewhere[i]);
      if (elsewhere[i]) continue;
      for (int node = 0; node < weights.nodes(); ++node) {
        weights.pack(node, layer, expert, made.matrices(), 0, weights.slice(node).strips());
      }
    }
    // All are packed by now: none has overwritten another.
    for (int i = 0; i < 6; ++i) {
      if (elsewhere[i]) continue;
      std::vector<uint8_t> found;
      for (const ExpertRegion& region : weights.regions(i / 3, i % 3)) {
        CHECK(region.offset == static_cast<int64_t>(found.size()));
        found.insert(found.end(), region.begin, region.begin + region.bytes);
      }
      CHECK(found == whole);
    }
  }
  const ThreadPlan plan = plan_threads(simulated_nodes(1), 1);
  CHECK_THROWS(std::invalid_argument, Weights(shape, plan, false, {true, false}));
}

// Kernels that note each read of weights before they do what the portable ones do.
struct Read {
  pthread_t thread;
  const uint8_t* begin;
  int64_t bytes;
};
std::mutex reads_mutex;
std::vector<Read> reads;

void noting_matmul(const MatmulTask& task) {
  {
    const std::lock_guard<std::mutex> lock(reads_mutex);
    reads.push_back(
        {pthread_self(), task.strips, task.num_strips * task.num_blocks * kStripBlockBytes});
  }
  kScalarKernels.matmul(task);
}

void test_no_thread_reads_weights_of_another_node(const std::vector<Node>& nodes, int threads,
                                                  const ExpertsShape& shape) {
  const ThreadPlan plan = plan_threads(nodes, threads);
  Weights weights(shape, plan, true);
  ThreadPool pool(plan);
  ActivationKernels noting = kScalarKernels;
  noting.matmul = noting_matmul;
  LayerRunner runner(weights, {"noting", &noting, &noting}, pool, plan, true);
  const Expert made(shape);
  for (int node = 0; node < weights.nodes(); ++node) {
    for (int64_t expert = 0; expert < shape.num_experts; ++expert) {
      weights.pack(node, 0, expert, made.matrices(), 0, weights.slice(node).strips());
    }
  }
  std::vector<pthread_t> thread_of(pool.threads());
  pool.run(1, [&](int, int worker) { thread_of[worker] = pthread_self(); }, false);

  for (const int64_t tokens : {1, 5, 150}) {
    reads.clear();
    const std::vector<float> x(tokens * shape.hidden, 0.5f);
    const std::vector<float> ones(tokens * 2, 1.0f);
    std::vector<float> out(tokens * shape.hidden);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < tokens * 2; ++i) ids.push_back(i % shape.num_experts);
    runner.run({0, tokens, 2, x.data(), Precision::kFp32, ids.data(), ones.data(), out.data()});
    int64_t bytes = 0;
    for (const Read& read : reads) {
      bytes += read.bytes;
      int reader = -1, home = -1;
      for (int worker = 0; worker < pool.threads(); ++worker) {
        if (pthread_equal(thread_of[worker], read.thread)) reader = pool.node_of(worker);
      }
      for (int node = 0; node < weights.nodes(); ++node) {
        const Arena& arena = weights.arena(node);
        const bool within =
            read.begin >= arena.data() && read.begin + read.bytes <= arena.data() + arena.bytes();
        if (within) home = node;
      }
      CHECK(reader >= 0 && home >= 0);
      CHECK(reader == home);
    }
    // Every expert that has a token, whole and once: 150 tokens are one block for each expert.
    const int64_t active = std::min<int64_t>(tokens * 2, shape.num_experts);
    CHECK(bytes == active * weights.bytes() / shape.num_experts);
  }
}

void test_memory_is_bound_to_its_node_or_it_is_said_why_not() {
  const Arena anywhere("a test", 5 << 20, true);
  CHECK(anywhere.trouble().empty());
  const Arena nowhere("a test", 5 << 20, true, 1000);
  CHECK(nowhere.trouble().find("a test on NUMA node 1000: ") == 0);
  nowhere.data()[(5 << 20) - 1] = 1;

  const Arena bound("a test", 5 << 20, true, 0);
  if (!bound.trouble().empty()) {
    std::printf("skipped, memory cannot be bound here: %s\n", bound.trouble().c_str());
    return;
  }
  int policy = -1;
  unsigned long mask[16] = {};
  uint8_t* last = bound.data() + bound.bytes() - 1;
  CHECK(syscall(SYS_get_mempolicy, &policy, mask, 8 * sizeof(mask), last, MPOL_F_ADDR) == 0);
  CHECK(policy == MPOL_BIND && mask[0] == 1);
}

void test_what_the_system_refuses_is_said_and_everything_works() {
  const ExpertsShape shape{1, 2, 64, 32};
  std::vector<Node> nodes = simulated_nodes(1);
  nodes.push_back({1000, {9000}, 1});  // memory and CPU that no machine has
  Experts experts(shape, "scalar", 2, true, nodes);
  const std::vector<std::string> troubles = experts.troubles();
  CHECK(troubles.size() == 2);
  CHECK(troubles.at(0).find("the routed experts' weights on NUMA node 1000: ") == 0);
  CHECK(troubles.at(1).find("refused to pin 1 of 2 threads") != std::string::npos);
  const Expert made(shape);
  experts.load(0, 1, made.matrices());
  const std::vector<float> x(shape.hidden, 1.0f);
  std::vector<float> out(shape.hidden);
  const int32_t id = 1;
  const float weight = 1;
  experts.submit({0, 1, 1, x.data(), Precision::kFp32, &id, &weight, out.data()})->wait();
  CHECK(std::count(out.begin(), out.end(), 0.0f) < shape.hidden);
}

void test_gigabyte_pages_are_used_where_reserved_and_else_replaced() {
  constexpr size_t kBytes = 2 * kGigabytePageBytes + 12345;
  Arena arena("a test", kBytes, true);
  CHECK(arena.gigabytes_to_try() <= 2);
  // Tried although none may be left: what takes its place must be zeroed memory all the same.
  arena.try_gigabyte_page(1);
  arena.data()[kGigabytePageBytes] = 7;
  arena.data()[kBytes - 1] = 7;
  CHECK(arena.data()[2 * kGigabytePageBytes - 1] == 0);
  CHECK(arena.data()[kGigabytePageBytes - 1] == 0);
  CHECK(arena.gigabyte_pages() <= static_cast<int>(arena.gigabytes_to_try()));
  if (arena.gigabytes_to_try() == 0) {
    std::printf("skipped: no 1 GB pages are reserved here, only their replacement was tested\n");
  }
}

}  // namespace

int main() {
  test_threads_are_dealt_in_proportion_to_cores();
  test_workers_run_on_their_node_alone_if_there_are_cpus_enough();
  test_nodes_are_those_whose_cpus_we_may_use();
  test_slices_cover_every_strip_once_and_waste_nothing();
  test_regions_are_the_expert_of_one_node_and_those_elsewhere_take_nothing();
  const ExpertsShape padded{1, 4, 96, 160}, narrow{1, 4, 32, 32}, wide{1, 4, 512, 256};
  for (const auto& [nodes, threads] : {std::pair{1, 2}, {2, 2}, {2, 5}, {3, 3}, {3, 7}, {6, 6}}) {
    for (const ExpertsShape& shape : {padded, narrow, wide}) {
      test_no_thread_reads_weights_of_another_node(simulated_nodes(nodes), threads, shape);
    }
  }
  test_memory_is_bound_to_its_node_or_it_is_said_why_not();
  test_what_the_system_refuses_is_said_and_everything_works();
  test_gigabyte_pages_are_used_where_reserved_and_else_replaced();
  std::printf("%s\n", failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
