#include "dispatch.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

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

// AMX registers are 8 KB per thread, which Linux saves only for processes that ask. The permission
// is the whole process's, threads to come included; a thread whose alternate signal stack is too
// small for them makes the kernel refuse.
bool permitted_to_use_tiles() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The product of one strip of random weights with random activations.
std::vector<float> sample_product(const ActivationKernels& kernels, int64_t num_tokens) {
  constexpr int64_t kBlocks = 3, kWords = kBlocks * kStripBlockBytes / 4;
  constexpr int64_t kElements = kBlocks * kBlockColumns / 2;
  struct alignas(64) Buffers {
    uint32_t strip[kWords];
    uint8_t scratch[kScratchBytes];
    float sums[20 * kStripRows];
    uint32_t x[20 * kElements];
  };
  const auto buffers = std::make_unique<Buffers>();
  uint32_t random = 1;
  // Any bits do as nibbles. As bf16, scales lie between 2^-15 and 2, activations between 2^-7
  // and 2.
  const auto next = [&] { return random = random * 1664525 + 1013904223; };
  for (uint32_t& word : buffers->strip) word = next();
  for (int64_t panel = 0; panel < 2 * kBlocks; ++panel) {
    uint32_t* scales = buffers->strip + (panel * kPanelBytes + kPanelNibbleBytes) / 4;
    for (int i = 0; i < kPanelRows; ++i) scales[i] = (next() & 0x87ff87ff) | 0x38003800;
  }
  for (uint32_t& pair : buffers->x) pair = (next() & 0x83ff83ff) | 0x3c003c00;
  kernels.matmul({reinterpret_cast<uint8_t*>(buffers->strip), 1, kBlocks, buffers->x, num_tokens,
                  buffers->sums, buffers->scratch});
  return {buffers->sums, buffers->sums + num_tokens * kStripRows};
}

// A trial, with few tokens and with more than a tile has rows: that both give the same bits rests
// on tiles that add as Intel documents, so tiles that do not are not used.
bool tiles_give_documented_bits() {
  for (const int64_t num_tokens : {1, 20}) {
    const std::vector<float> found = sample_product(kAmxKernels, num_tokens);
    const std::vector<float> documented = sample_product(kAmxEmulatedKernels, num_tokens);
    if (std::memcmp(found.data(), documented.data(), found.size() * sizeof(float)) != 0) {
      return false;
    }
  }
  return true;
}

bool has_amx() {
  constexpr uint64_t kTiles = 0x60000;  // tile configuration and tile data
  const uint32_t leaf7 = cpuid(7, 0).d;
  const bool bf16 = bit(leaf7, 22), tile = bit(leaf7, 24);
  if (!has_avx512_bf16() || (saved_registers() & kTiles) != kTiles || !bf16 || !tile) return false;
  static const bool usable = permitted_to_use_tiles() && tiles_give_documented_bits();
  return usable;
}

// Zen 5 has 64 miss buffers in L1: lines come straight into it, and asking for them in L2 before
// only takes buffers away.
bool is_zen5() {
  char vendor[12];
  const Cpuid leaf0 = cpuid(0, 0), leaf1 = cpuid(1, 0);
  std::memcpy(vendor, &leaf0.b, 4);
  std::memcpy(vendor + 4, &leaf0.d, 4);
  std::memcpy(vendor + 8, &leaf0.c, 4);
  const uint32_t family = (leaf1.a >> 8 & 15) + (leaf1.a >> 20 & 255);
  return std::memcmp(vendor, "AuthenticAMD", sizeof(vendor)) == 0 && family == 0x1a;
}

struct Implementation {
  KernelTable table;
  bool (*supported)();
  bool for_tests = false;  // runs when it is asked for by name, and is not offered
};

// Slowest first.
constexpr Implementation kImplementations[] = {
    {{"scalar", &kScalarKernels, &kScalarKernels}, [] { return true; }},
    {{"avx2", &kAvx2Kernels, &kAvx2Kernels}, has_avx2},
    {{"avx512", &kAvx512Kernels, &kAvx512Kernels}, has_avx512},
    {{"avx512_bf16", &kAvx512Bf16Kernels, &kAvx512Kernels}, has_avx512_bf16},
    {{"amx", &kAmxKernels, &kAvx512Kernels}, has_amx},
    {{"amx_emulated", &kAmxEmulatedKernels, &kScalarKernels}, [] { return true; }, true},
};

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

// On a 2-core Zen 4 (2026-11), share of the read roof at one token by distance in blocks: none
// 0.48, 4 0.52, 10 0.61, 14 0.86, 20 0.86, 40 0.85, 80 0.80; into L1 instead 0.46. On a 2-core Zen
// 5 20 blocks cost 0.02 to 0.15 of the roof; one block is as good as none.
const int64_t kStreamAheadBytes = (is_zen5() ? 1 : 20) * kStripBlockBytes;

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Implementation& implementation : kImplementations) {
    if (implementation.for_tests || !implementation.supported()) continue;
    names.emplace_back(implementation.table.isa);
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
      if (supported && !implementation.for_tests) fastest = &implementation;
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
