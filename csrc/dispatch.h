// Which kernels this machine runs: CPU features and the operating system's permission to use their
// registers, or the one named in HYBRIDK2_ISA. AMX's permission is asked for here, once, and its
// tiles are tried against their portable twin, "amx_emulated", which tests may ask for by name.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace hybridk2 {

struct KernelTable {
  const char* isa;
  const ActivationKernels* bf16;  // for bf16 activations
  const ActivationKernels* fp32;  // for fp32 activations: nothing is rounded
};

// Names of the instruction sets this machine can run, slowest first.
std::vector<std::string> available_isas();

// The table named `isa`; for an empty name the one HYBRIDK2_ISA names, else the fastest. Throws
// ConfigurationError for a name that is unknown or that this machine cannot run.
const KernelTable& select_kernels(const std::string& isa);

}  // namespace hybridk2
