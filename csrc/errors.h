// What the engine throws at its boundary. bindings.cc gives each a Python type; a wrong argument is
// std::invalid_argument. Kernels throw nothing.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace hybridk2 {

// A choice that this machine cannot run, such as an instruction set it lacks.
struct ConfigurationError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The request is well formed but the engine's state forbids it: an expert that is not loaded,
// loaded twice, or an engine of the parent process used after fork.
struct StateError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct OutOfMemoryError : std::runtime_error {
  OutOfMemoryError(const std::string& what, uint64_t bytes)
      : std::runtime_error("no memory for " + what + ": " + std::to_string(bytes) + " bytes (" +
                           std::to_string((bytes + 500'000'000) / 1'000'000'000) +
                           " GB) were asked") {}
};

}  // namespace hybridk2
