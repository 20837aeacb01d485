// What kernels/amx.cc runs on, apart from the tile instructions: its vector code with the portable
// twin of the tiles must give the bits of the twin that needs no vectors. Few tokens go through
// vdpbf16ps, so this also proves that vdpbf16ps and the tiles' documented arithmetic agree, on
// whatever CPU runs it: with denormals, infinities, overflow and NaN. Needs AVX-512 with BF16.
#include <immintrin.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "kernels/kernels.h"

using namespace hybridk2;

namespace {

// clang-format off: each needs what the one before defines.
#include "kernels/amx_vectors.inl.h"
#include "kernels/emulated_tiles.inl.h"
#include "kernels/amx.inl.h"
// clang-format on

struct alignas(64) Scratch {
  uint8_t bytes[kScratchBytes];
};

// Any sign; exponents `lowest` to `lowest + spread - 1`.
uint16_t random_bf16(std::mt19937& random, uint32_t lowest, uint32_t spread) {
  const uint32_t exponent = lowest + random() % spread;
  return static_cast<uint16_t>((random() & 0x807f) | exponent << 7);
}

// kAnyBits: like activations, and one in 16 of any bits, among them denormals, infinities and NaN.
// kTiny: around the smallest normal, so that sums are denormal now and then.
enum class Kind { kUsual, kAnyBits, kTiny };

uint16_t random_activation(std::mt19937& random, Kind kind) {
  if (kind == Kind::kAnyBits && random() % 16 == 0) return static_cast<uint16_t>(random());
  return kind == Kind::kTiny ? random_bf16(random, 0, 2) : random_bf16(random, 110, 20);
}

void test_bits(int64_t num_strips, int64_t num_blocks, int64_t num_tokens, Kind kind) {
  std::mt19937 random(static_cast<uint32_t>(num_tokens * 100 + num_blocks * 10 + num_strips));
  struct alignas(64) StripBlock {
    uint8_t bytes[kStripBlockBytes];
  };
  std::vector<StripBlock> weights(num_strips * num_blocks);
  for (StripBlock& block : weights) {
    for (uint8_t& byte : block.bytes) byte = static_cast<uint8_t>(random());
    for (int panel = 0; panel < 2; ++panel) {
      for (int i = 0; i < kPanelRows * kGroupsPerBlock; ++i) {
        const uint16_t scale = random_bf16(random, 100, 40);
        std::memcpy(block.bytes + panel * kPanelBytes + kPanelNibbleBytes + 2 * i, &scale, 2);
      }
    }
  }
  // Exactly as large as promised: a sanitizer sees the first byte beyond.
  std::vector<uint32_t> x(num_tokens * num_blocks * kBlockColumns / 2);
  for (uint32_t& pair : x) {
    pair = random_activation(random, kind) | uint32_t{random_activation(random, kind)} << 16;
  }
  std::vector<Scratch> scratch(1);
  const auto run = [&](void (*kernel)(const MatmulTask&)) {
    struct alignas(64) Row {
      float sums[kStripRows];
    };
    std::vector<Row> rows(num_strips * num_tokens);
    kernel({weights[0].bytes, num_strips, num_blocks, x.data(), num_tokens, rows[0].sums,
            scratch[0].bytes});
    std::vector<float> sums(rows.size() * kStripRows);
    std::memcpy(sums.data(), rows.data(), sums.size() * sizeof(float));
    return sums;
  };
  const std::vector<float> vectors = run(matmul), twin = run(kAmxEmulatedKernels.matmul);
  int64_t finite = 0;
  for (size_t i = 0; i < twin.size(); ++i) {
    // The bits of a NaN are nobody's business.
    CHECK(std::memcmp(&vectors[i], &twin[i], sizeof(float)) == 0 ||
          (std::isnan(vectors[i]) && std::isnan(twin[i])));
    finite += std::isfinite(twin[i]);
  }
  CHECK(finite > 0);
}

// Even and odd columns apart: the order that avx512_bf16 does not have. Were both the same, the
// comparison above would prove nothing.
void test_the_order_of_sums_shows() {
  std::mt19937 random(1);
  Scratch scratch;
  struct alignas(64) {
    uint8_t bytes[kStripBlockBytes];
  } weights;
  for (uint8_t& byte : weights.bytes) byte = static_cast<uint8_t>(random());
  for (int panel = 0; panel < 2; ++panel) {
    uint8_t* scales = weights.bytes + panel * kPanelBytes + kPanelNibbleBytes;
    for (int i = 0; i < kPanelRows * kGroupsPerBlock; ++i) {
      const uint16_t one = 0x3f80;
      std::memcpy(scales + 2 * i, &one, 2);
    }
  }
  uint32_t x[kBlockColumns / 2];
  for (uint32_t& pair : x) {
    pair = random_bf16(random, 110, 20) | uint32_t{random_bf16(random, 110, 20)} << 16;
  }
  alignas(64) float apart[kStripRows], mixed[kStripRows];
  matmul({weights.bytes, 1, 1, x, 1, apart, scratch.bytes});
  kAvx512Bf16Kernels.matmul({weights.bytes, 1, 1, x, 1, mixed, scratch.bytes});
  CHECK(std::memcmp(apart, mixed, sizeof(apart)) != 0);
  for (int r = 0; r < kStripRows; ++r) CHECK(std::fabs(apart[r] - mixed[r]) < 1e-4f);
}

}  // namespace

int main() {
  const std::vector<std::string> isas = available_isas();
  if (std::find(isas.begin(), isas.end(), "avx512_bf16") == isas.end()) {
    std::printf("skipped: this CPU has no AVX-512 with BF16\n");
    return 0;
  }
  for (const int64_t num_tokens : {1, 2, 3, 5, 15, 16, 17, 34}) {
    for (const int64_t num_blocks : {1, 2, 3, 4}) {
      test_bits(1, num_blocks, num_tokens, Kind::kUsual);
      test_bits(3, num_blocks, num_tokens, Kind::kAnyBits);
      test_bits(3, num_blocks, num_tokens, Kind::kTiny);
    }
  }
  test_the_order_of_sums_shows();
  std::printf("%s\n", failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
