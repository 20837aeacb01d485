#include "dispatch.h"

#include <cpuid.h>

#include <cstdint>
#include <cstdlib>

#include "errors.h"

namespace hybridk2 {
namespace {

struct Cpuid {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Cpuid cpuid(uint32_t leaf, uint32_t subleaf) {
  Cpuid r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // leaves zeros where there is no leaf
  return r;
}

bool bit(uint32_t word, int index) { return word >> index & 1; }

// Register states that the operating system saves and restores (XCR0); 0 when it saves none.
uint64_t saved_registers() {
  constexpr int kOsxsave = 27;
  if (!bit(cpuid(1, 0).c, kOsxsave)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool has_avx2() {
  constexpr uint64_t kYmm = 0x6;  // SSE and AVX state
  const Cpuid leaf1 = cpuid(1, 0);
  const bool fma = bit(leaf1.c, 12), avx = bit(leaf1.c, 28), f16c = bit(leaf1.c, 29);
  const bool avx2 = bit(cpuid(7, 0).b, 5);
  return (saved_registers() & kYmm) == kYmm && avx && fma && f16c && avx2;
}

bool has_avx512() {
  constexpr uint64_t kZmm = 0xe6;  // the above, opmask and both halves of ZMM state
  const uint32_t leaf7 = cpuid(7, 0).b;
  const bool f = bit(leaf7, 16), dq = bit(leaf7, 17), bw = bit(leaf7, 30), vl = bit(leaf7, 31);
  return has_avx2() && (saved_registers() & kZmm) == kZmm && f && dq && bw && vl;
}

bool has_avx512_bf16() { return has_avx512() && bit(cpuid(7, 1).a, 5); }

struct Implementation {
  KernelTable table;
  bool (*supported)();
};

// Slowest first.
constexpr Implementation kImplementations[] = {
    {{"scalar", &kScalarKernels, &kScalarKernels}, [] { return true; }},
    {{"avx2", &kAvx2Kernels, &kAvx2Kernels}, has_avx2},
    {{"avx512", &kAvx512Kernels, &kAvx512Kernels}, has_avx512},
    {{"avx512_bf16", &kAvx512Bf16Kernels, &kAvx512Kernels}, has_avx512_bf16},
};

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Implementation& implementation : kImplementations) {
    if (implementation.supported()) names.emplace_back(implementation.table.isa);
  }
  return names;
}

const KernelTable& select_kernels(const std::string& isa) {
  const char* forced = isa.empty() ? std::getenv("HYBRIDK2_ISA") : nullptr;
  const std::string name = forced != nullptr ? forced : isa;
  const std::string source = forced != nullptr ? "HYBRIDK2_ISA: " : "";
  const Implementation* fastest = nullptr;
  for (const Implementation& implementation : kImplementations) {
    const bool supported = implementation.supported();
    if (name.empty()) {
      if (supported) fastest = &implementation;
    } else if (name == implementation.table.isa) {
      if (supported) return implementation.table;
      throw ConfigurationError(source + "this machine cannot run the instruction set '" + name +
                               "'; it runs " + joined(available_isas()));
    }
  }
  if (fastest != nullptr) return fastest->table;
  throw ConfigurationError(source + "there is no instruction set '" + name +
                           "'; this machine runs " + joined(available_isas()));
}

}  // namespace hybridk2
