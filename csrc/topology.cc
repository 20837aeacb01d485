#include "topology.h"

#include <dirent.h>
#include <sched.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <new>
#include <set>
#include <sstream>

namespace hybridk2 {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// CPUs that the calling thread may run on, ascending: what taskset, cgroups and containers left.
std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  // Room for 8192 CPUs: a smaller mask makes the call fail on a machine with more.
  constexpr int kMaxCpus = 8192;
  cpu_set_t* mask = CPU_ALLOC(kMaxCpus);
  if (mask == nullptr) throw std::bad_alloc();
  const size_t mask_bytes = CPU_ALLOC_SIZE(kMaxCpus);
  CPU_ZERO_S(mask_bytes, mask);
  if (sched_getaffinity(0, mask_bytes, mask) == 0) {
    for (int cpu = 0; cpu < kMaxCpus; ++cpu) {
      if (CPU_ISSET_S(cpu, mask_bytes, mask)) cpus.push_back(cpu);
    }
  }
  CPU_FREE(mask);
  if (cpus.empty()) cpus.push_back(0);
  return cpus;
}

// "0-2,8" as 0, 1, 2, 8.
std::vector<int> parse_cpu_list(const std::string& list) {
  std::vector<int> cpus;
  std::istringstream parts(list);
  for (std::string part; std::getline(parts, part, ',');) {
    std::istringstream range(part);
    int first = 0;
    if (!(range >> first)) continue;
    int last = first;
    if (range.get() == '-') range >> last;
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

Node node_of(int number, const std::vector<int>& cpus, const std::string& system) {
  Node node{number, {}, 0};
  std::vector<int> siblings;
  std::set<std::string> cores;
  for (const int cpu : cpus) {
    const std::string name = "cpu" + std::to_string(cpu);
    // The CPU and its hyper-threads, as the kernel writes them ("0,64").
    const std::string core = first_line(system + "/cpu/" + name + "/topology/thread_siblings_list");
    const bool first = cores.insert(core.empty() ? name : core).second;
    (first ? node.cpus : siblings).push_back(cpu);
  }
  node.cores = static_cast<int>(node.cpus.size());
  node.cpus.insert(node.cpus.end(), siblings.begin(), siblings.end());
  return node;
}

// The kernel's CPU lists by node number.
std::map<int, std::vector<int>> cpus_of_nodes(const std::string& system) {
  std::map<int, std::vector<int>> nodes;
  DIR* folder = opendir((system + "/node").c_str());
  if (folder == nullptr) return nodes;
  while (const dirent* entry = readdir(folder)) {
    const std::string name = entry->d_name;
    if (name.rfind("node", 0) != 0) continue;
    const std::string digits = name.substr(4);
    if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos) continue;
    nodes[std::stoi(digits)] = parse_cpu_list(first_line(system + "/node/" + name + "/cpulist"));
  }
  closedir(folder);
  return nodes;
}

// All nodes as one, of no number.
Node whole_machine(const std::vector<Node>& nodes) {
  std::set<int> firsts, all;
  for (const Node& node : nodes) {
    firsts.insert(node.cpus.begin(), node.cpus.begin() + node.cores);
    all.insert(node.cpus.begin(), node.cpus.end());
  }
  Node whole{kAnyNode, {firsts.begin(), firsts.end()}, static_cast<int>(firsts.size())};
  std::set_difference(all.begin(), all.end(), firsts.begin(), firsts.end(),
                      std::back_inserter(whole.cpus));
  return whole;
}

// Each node one thread, then every further one to the node that has most cores per thread with it:
// no node gets more threads than cores while another has cores to spare.
std::vector<int> deal(const std::vector<Node>& nodes, int threads) {
  std::vector<int> dealt(nodes.size(), 1);
  for (int left = threads - static_cast<int>(nodes.size()); left > 0; --left) {
    size_t best = 0;
    for (size_t n = 1; n < nodes.size(); ++n) {
      if (nodes[n].cores * (dealt[best] + 1) > nodes[best].cores * (dealt[n] + 1)) best = n;
    }
    ++dealt[best];
  }
  return dealt;
}

}  // namespace

std::vector<Node> usable_nodes(const std::string& system) {
  const std::vector<int> allowed = allowed_cpus();
  std::vector<Node> nodes;
  std::set<int> placed;
  for (const auto& [number, cpus] : cpus_of_nodes(system)) {
    std::vector<int> usable;
    for (const int cpu : cpus) {
      const bool may = std::binary_search(allowed.begin(), allowed.end(), cpu);
      if (may && placed.insert(cpu).second) usable.push_back(cpu);
    }
    if (!usable.empty()) nodes.push_back(node_of(number, usable, system));
  }
  if (nodes.size() < 2 || placed.size() < allowed.size()) {
    nodes = {node_of(kAnyNode, allowed, system)};
  }
  return nodes;
}

std::vector<Node> simulated_nodes(int count) {
  const std::vector<int> cpus = whole_machine(usable_nodes()).cpus;
  std::vector<Node> nodes;
  for (int n = 0; n < count; ++n) {
    Node node{kAnyNode, {cpus[n % cpus.size()]}, 1};
    for (size_t c = n + count; c < cpus.size(); c += count) node.cpus.push_back(cpus[c]);
    node.cores = static_cast<int>(node.cpus.size());
    nodes.push_back(node);
  }
  return nodes;
}

int cores_of(const std::vector<Node>& nodes) {
  int cores = 0;
  for (const Node& node : nodes) cores += node.cores;
  return cores;
}

ThreadPlan plan_threads(std::vector<Node> nodes, int threads) {
  ThreadPlan plan;
  if (threads < static_cast<int>(nodes.size())) {
    plan.trouble = "too few threads for one on each of " + std::to_string(nodes.size()) +
                   " NUMA nodes: no weights are placed near a thread";
    nodes = {whole_machine(nodes)};
  }
  plan.nodes = std::move(nodes);
  plan.threads_of_node = deal(plan.nodes, threads);
  std::set<int> cpus;
  plan.a_cpu_each = true;
  for (size_t n = 0; n < plan.nodes.size(); ++n) {
    const std::vector<int>& own = plan.nodes[n].cpus;
    // Nodes that tests made up may share CPUs.
    const size_t before = cpus.size();
    cpus.insert(own.begin(), own.end());
    plan.a_cpu_each = plan.a_cpu_each && cpus.size() == before + own.size() &&
                      plan.threads_of_node[n] <= static_cast<int>(own.size());
  }
  plan.cpus_to_spare = plan.a_cpu_each && threads < static_cast<int>(cpus.size());
  for (size_t n = 0; n < plan.nodes.size(); ++n) {
    const std::vector<int>& own = plan.nodes[n].cpus;
    for (int t = 0; t < plan.threads_of_node[n]; ++t) {
      plan.workers.push_back(
          {static_cast<int>(n), plan.a_cpu_each ? std::vector<int>{own[t]} : own});
    }
  }
  return plan;
}

}  // namespace hybridk2
