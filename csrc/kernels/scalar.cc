// Any x86-64: the compiler's portable vectors of four, products and sums rounded separately.
#include "kernels.h"

namespace hybridk2 {
namespace {

constexpr int kRowsPerVector = 4;
constexpr int kStepsPerLine = 8;
constexpr int kColumnsPerElement = 1;
constexpr int kRegisterTokens = 6;
constexpr bool kDecodesBetween = false;
constexpr int kStreamTokens = 0;
constexpr int kSideBySideSums = 0;

using Sum = float __attribute__((vector_size(16)));
using Weight = Sum;
using Element = float;
using Line = uint32_t __attribute__((vector_size(16)));

// At most 12 of the 16 registers hold accumulators.
constexpr int vectors_at_once(int tokens) { return tokens <= 3 ? 4 : 2; }

Sum zero() { return Sum{}; }

Sum load(const float* p) {
  Sum value;
  __builtin_memcpy(&value, p, sizeof(value));
  return value;
}

void store(float* p, Sum value) { __builtin_memcpy(p, &value, sizeof(value)); }

Line load_line(const uint8_t* p) {
  Line line;
  __builtin_memcpy(&line, p, sizeof(line));
  return line;
}

template <int Step>
Weight decode(Line line) {
  using Signed = int32_t __attribute__((vector_size(16)));
  const Line nibbles = line >> (4 * (Step / 2) + 16 * (Step % 2)) & 15;
  return __builtin_convertvector((Signed)nibbles - 8, Sum);
}

Element broadcast(const uint32_t* x) {
  float value;
  __builtin_memcpy(&value, x, sizeof(value));
  return value;
}

Sum multiply_add(Weight weight, Element element, Sum sum) { return weight * element + sum; }

Sum load_scale(const uint8_t* p) {
  uint16_t bf16[kRowsPerVector];
  __builtin_memcpy(bf16, p, sizeof(bf16));
  const Line bits = {uint32_t{bf16[0]} << 16, uint32_t{bf16[1]} << 16, uint32_t{bf16[2]} << 16,
                     uint32_t{bf16[3]} << 16};
  return (Sum)bits;
}

Sum scale_add(Sum sum, Sum scale, Sum total) { return sum * scale + total; }

#include "arithmetic_roof.inl.h"
#include "matmul.inl.h"
#include "swiglu.inl.h"

}  // namespace

const ActivationKernels kScalarKernels = {kColumnsPerElement, matmul, swiglu, kTokensPerTile,
                                          arithmetic_roof};

}  // namespace hybridk2
