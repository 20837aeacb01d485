// The part of hybridk2._native that connects the experts to a device.
#pragma once

#include <pybind11/pybind11.h>

namespace hybridk2 {

// After the experts and the exceptions are known to the module.
void bind_handoff(pybind11::module_& module);

}  // namespace hybridk2
