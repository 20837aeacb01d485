// The CPUs and NUMA nodes that this process may use, and which thread works where. Knows the
// kernel's files under /sys, not what the threads do.
#pragma once

#include <string>
#include <vector>

namespace hybridk2 {

// Where memory may lie when nobody asks for a node.
constexpr int kAnyNode = -1;

struct Node {
  int number;             // the kernel's; kAnyNode: one that only tests have, or the whole machine
  std::vector<int> cpus;  // one CPU per physical core, in ascending order, then their siblings
  int cores;              // physical ones among them
};

// The nodes with CPUs that the calling thread may run on, by ascending number. A machine that says
// nothing of nodes has one, of number kAnyNode, and so has one with a single node: there is nothing
// to choose. system: the folder that describes devices.
std::vector<Node> usable_nodes(const std::string& system = "/sys/devices/system");

// `count` nodes on whatever machine this is, for tests: its CPUs dealt out in turn, shared when
// there are fewer of them than nodes.
std::vector<Node> simulated_nodes(int count);

// Physical cores of all nodes.
int cores_of(const std::vector<Node>& nodes);

struct WorkerPlace {
  int node;               // index into ThreadPlan::nodes
  std::vector<int> cpus;  // it runs on one of these
};

struct ThreadPlan {
  std::vector<Node> nodes;
  std::vector<WorkerPlace> workers;  // those of a node side by side
  std::vector<int> threads_of_node;
  bool a_cpu_each;      // no two workers share a CPU
  bool cpus_to_spare;   // and CPUs are left beside theirs
  std::string trouble;  // what could not be had; empty: nothing
};

// Deals threads (at least 1) to nodes in proportion to their cores. Every worker has a CPU of its
// own if there are enough, else all CPUs of its node. Fewer threads than nodes work as if the
// machine had one node, and `trouble` says so.
ThreadPlan plan_threads(std::vector<Node> nodes, int threads);

}  // namespace hybridk2
