#include "handoff_bindings.h"

#include <pybind11/stl.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_stream.h"
#include "experts.h"
#include "fake_stream.h"
#include "host_functions.h"
#include "mailbox.h"

namespace py = pybind11;

namespace hybridk2 {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

// As for the experts: in a child of fork() there is no device and there are no threads to wait for.
struct DeleteInOwnProcess {
  pid_t process = getpid();
  template <typename T>
  void operator()(T* object) const {
    if (getpid() != process) return;
    const py::gil_scoped_release release;
    delete object;
  }
};
template <typename T>
using Held = std::unique_ptr<T, DeleteInOwnProcess>;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename Mechanism>
Held<Handoff> open_handoff(Experts& experts, DeviceStream& stream, int64_t top_k, bool bf16,
                           double timeout_seconds) {
  const ExpertsShape& experts_shape = experts.shape();
  HandoffShape shape{};
  shape.num_layers = experts_shape.num_layers;
  shape.hidden = experts_shape.hidden;
  shape.top_k = top_k;
  shape.precision = bf16 ? Precision::kBf16 : Precision::kFp32;
  shape.timeout = std::chrono::nanoseconds(static_cast<int64_t>(timeout_seconds * 1e9));
  HostWorkers workers{
      [&experts](std::function<void()> job) { return experts.enqueue(std::move(job)); },
      [&experts](const LayerCall& call) { experts.compute(call); }};
  return Held<Handoff>(new Mechanism(shape, std::move(workers), stream));
}

void submit(Handoff& handoff, StreamHandle stream, int64_t layer, int64_t tokens, uintptr_t x,
            uintptr_t expert_ids, uintptr_t weights) {
  handoff.submit(stream, layer, tokens, at<const void>(x), at<const int32_t>(expert_ids),
                 at<const float>(weights));
}

void collect(Handoff& handoff, StreamHandle stream, int64_t layer, int64_t tokens, uintptr_t out) {
  handoff.collect(stream, layer, tokens, at<float>(out));
}

std::vector<std::tuple<std::string, int32_t, double>> take_events(DeviceStream& stream) {
  std::vector<std::tuple<std::string, int32_t, double>> events;
  for (const Event& event : stream.log().take()) {
    events.emplace_back(event.name, event.layer, event.seconds);
  }
  return events;
}

std::chrono::microseconds microseconds(double seconds) {
  return std::chrono::microseconds(static_cast<int64_t>(seconds * 1e6));
}

}  // namespace

void bind_handoff(py::module_& module) {
  module.attr("HANDOFF_TOKENS") = kHandoffTokens;
  module.attr("HANDOFF_SLOTS") = kHandoffSlots;
  module.attr("MAILBOX_PTX") = kMailboxPtx;
  module.def("pin_host_memory", &pin_host_memory, Release());
  module.def("unpin_host_memory", &unpin_host_memory, Release());
  py::class_<DeviceStream, Held<DeviceStream>>(module, "DeviceStream")
      .def("record_events", [](DeviceStream& stream, bool on) { stream.log().record(on); })
      .def("take_events", &take_events);
  py::class_<FakeStream, DeviceStream, Held<FakeStream>>(module, "FakeStream")
      .def(py::init([](uint32_t seed, double max_delay_seconds) {
        return Held<FakeStream>(new FakeStream(seed, microseconds(max_delay_seconds)));
      }))
      .def("work", [](FakeStream& stream, const std::string& name, int32_t layer,
                      double seconds) { stream.work(name, layer, microseconds(seconds)); })
      .def("begin_recording", &FakeStream::begin_recording)
      .def("end_recording", &FakeStream::end_recording)
      .def("replay", &FakeStream::replay)
      .def("synchronize", &FakeStream::synchronize, Release());
  module.def(
      "cuda_stream", [](int ordinal) { return Held<DeviceStream>(new CudaStream(ordinal)); },
      Release());
  py::class_<Handoff, Held<Handoff>>(module, "Handoff")
      .def("begin_step", &Handoff::begin_step, Release())
      .def("submit", &submit, Release())
      .def("collect", &collect, Release())
      .def("end_step", &Handoff::end_step, Release())
      .def("reset", &Handoff::reset, Release());
  module.def("open_mailbox", &open_handoff<Mailbox>, py::keep_alive<0, 1>(),
             py::keep_alive<0, 2>());
  module.def("open_host_functions", &open_handoff<HostFunctions>, py::keep_alive<0, 1>(),
             py::keep_alive<0, 2>());
}

}  // namespace hybridk2
