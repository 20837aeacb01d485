// hybridk2._native: the engine's experts for Python. Tensors arrive as addresses, whose dtype,
// shape and lifetime hybridk2/experts/host.py has checked; everything that is not a tensor is
// checked in C++.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arena.h"
#include "errors.h"
#include "experts.h"
#include "handoff_bindings.h"
#include "read_roof.h"
#include "topology.h"

namespace py = pybind11;

namespace hybridk2 {
namespace {

// In a child of fork() the threads do not exist and their condition variables still count sleepers:
// destroying them would wait forever. The child's copy is left to the end of its process.
struct DeleteInOwnProcess {
  void operator()(Experts* experts) const {
    if (!experts->belongs_to_this_process()) return;
    const py::gil_scoped_release release;  // waits for jobs in flight
    delete experts;
  }
};
using ExpertsHolder = std::unique_ptr<Experts, DeleteInOwnProcess>;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

PackedMatrix matrix(const std::pair<uintptr_t, uintptr_t>& addresses) {
  return {at<const uint32_t>(addresses.first), at<const uint16_t>(addresses.second)};
}

ExpertsHolder create(int64_t num_layers, int64_t num_experts, int64_t hidden, int64_t intermediate,
                     const std::string& isa, int threads, bool huge_pages, int simulated,
                     const std::vector<bool>& elsewhere, bool spins_when_idle) {
  const ExpertsShape shape{num_layers, num_experts, hidden, intermediate};
  const std::vector<Node> nodes = simulated > 0 ? simulated_nodes(simulated) : usable_nodes();
  return ExpertsHolder(
      new Experts(shape, isa, threads, huge_pages, nodes, elsewhere, spins_when_idle));
}

void load(Experts& experts, int64_t layer, int64_t expert,
          const std::pair<uintptr_t, uintptr_t>& gate, const std::pair<uintptr_t, uintptr_t>& up,
          const std::pair<uintptr_t, uintptr_t>& down) {
  experts.load(layer, expert, {matrix(gate), matrix(up), matrix(down)});
}

void pack(const Experts& experts, const std::pair<uintptr_t, uintptr_t>& gate,
          const std::pair<uintptr_t, uintptr_t>& up, const std::pair<uintptr_t, uintptr_t>& down,
          uintptr_t out) {
  pack_expert(experts.shape(), {matrix(gate), matrix(up), matrix(down)}, at<uint8_t>(out));
}

std::vector<std::tuple<uintptr_t, int64_t, int64_t>> regions(const Experts& experts, int64_t layer,
                                                             int64_t expert) {
  std::vector<std::tuple<uintptr_t, int64_t, int64_t>> found;
  for (const ExpertRegion& region : experts.regions(layer, expert)) {
    found.emplace_back(reinterpret_cast<uintptr_t>(region.begin), region.bytes, region.offset);
  }
  return found;
}

void dequantise(const Experts& experts, int64_t layer, int64_t expert, uintptr_t gate, uintptr_t up,
                uintptr_t down) {
  experts.dequantise(layer, expert, at<float>(gate), at<float>(up), at<float>(down));
}

Ticket submit(Experts& experts, int64_t layer, int64_t num_tokens, int64_t top_k, uintptr_t x,
              bool bf16, uintptr_t expert_ids, uintptr_t weights, uintptr_t out) {
  return experts.submit({layer, num_tokens, top_k, at<const void>(x),
                         bf16 ? Precision::kBf16 : Precision::kFp32, at<const int32_t>(expert_ids),
                         at<const float>(weights), at<float>(out)});
}

double arithmetic_roof(Experts& experts, bool bf16) {
  return experts.arithmetic_roof(bf16 ? Precision::kBf16 : Precision::kFp32);
}

PYBIND11_MODULE(_native, module) {
  module.doc() = "Routed INT4 experts in host memory. Used by hybridk2.experts.host only.";
  py::register_exception<ConfigurationError>(module, "ConfigurationError", PyExc_ValueError);
  py::register_exception<StateError>(module, "StateError", PyExc_RuntimeError);
  py::register_exception<OutOfMemoryError>(module, "OutOfMemoryError", PyExc_MemoryError);
  using Release = py::call_guard<py::gil_scoped_release>;
  module.def("available_isas", &available_isas);
  module.def("usable_cores", [] { return cores_of(usable_nodes()); });
  module.def("free_gigabyte_pages", [] { return free_gigabyte_pages(kAnyNode); });
  py::class_<Job, Ticket>(module, "Ticket")
      .def_property_readonly("done", &Job::done)
      .def_property_readonly("times",
                             [](const Job& job) {
                               const WorkTimes times = job.times();
                               return std::pair(times.began, times.ended);
                             })
      .def("wait", &Job::wait, Release())
      .def("finish", &Job::finish, Release());
  py::class_<Experts, ExpertsHolder>(module, "Experts")
      .def(py::init(&create), py::arg("num_layers"), py::arg("num_experts"), py::arg("hidden"),
           py::arg("intermediate"), py::arg("isa"), py::arg("threads"), py::arg("huge_pages"),
           py::arg("simulated_nodes"), py::arg("elsewhere"), py::arg("spins_when_idle"))
      .def_property_readonly("isa", &Experts::isa)
      .def_property_readonly("threads", &Experts::threads)
      .def_property_readonly("threads_of_node", &Experts::threads_of_node)
      .def_property_readonly("huge_pages", &Experts::huge_pages)
      .def_property_readonly("gigabyte_pages", &Experts::gigabyte_pages)
      .def_property_readonly("troubles", &Experts::troubles)
      .def_property_readonly("weight_bytes", &Experts::weight_bytes)
      .def_property_readonly("expert_bytes",
                             [](const Experts& experts) { return expert_bytes(experts.shape()); })
      .def("load", &load, Release())
      .def("pack", &pack, Release())
      .def("regions", &regions)
      .def("dequantise", &dequantise, Release())
      .def("submit", &submit, Release())
      .def("read_weights_seconds", &Experts::read_weights_seconds, Release())
      .def("arithmetic_roof", &arithmetic_roof, Release());
  bind_handoff(module);
  py::list loops;
  for (int loop = 0; loop < kNumReadLoops; ++loop) loops.append(read_loop_name(loop));
  module.attr("READ_LOOPS") = py::tuple(loops);
}

}  // namespace
}  // namespace hybridk2
