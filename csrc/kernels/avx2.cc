// AVX2 with FMA: eight rows at a time in fp32.
#include <immintrin.h>

#include "kernels.h"

namespace hybridk2 {
namespace {

constexpr int kRowsPerVector = 8;
constexpr int kStepsPerLine = 8;
constexpr int kColumnsPerElement = 1;
constexpr int kRegisterTokens = 6;
constexpr bool kDecodesBetween = false;
constexpr int kStreamTokens = 0;
constexpr int kSideBySideSums = 0;

using Sum = __m256;
using Weight = __m256;
using Element = __m256;
using Line = __m256i;

// At most 12 of the 16 registers hold accumulators. A whole strip for few tokens: each accumulator
// is a chain of FMAs, and four chains hide their latency.
constexpr int vectors_at_once(int tokens) { return tokens <= 3 ? 4 : 2; }

Sum zero() { return _mm256_setzero_ps(); }
Sum load(const float* p) { return _mm256_loadu_ps(p); }
void store(float* p, Sum value) { _mm256_storeu_ps(p, value); }
Line load_line(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

// The nibble stays where it is, as mantissa bits of the power of two whose bit there is worth 1;
// subtracting that power plus 8 is exact. Only nibbles that would reach the exponent are shifted,
// all by the same 16.
template <int Step>
Weight decode(Line line) {
  constexpr int kNibbleAt = 4 * (Step / 2) + 16 * (Step % 2);
  constexpr bool kShifted = kNibbleAt > 16;
  constexpr int kAt = kShifted ? kNibbleAt - 16 : kNibbleAt;
  constexpr int kExponent = (127 + 23 - kAt) << 23;
  const __m256i lanes = kShifted ? _mm256_srli_epi32(line, 16) : line;
  const __m256i nibble = _mm256_and_si256(lanes, _mm256_set1_epi32(15 << kAt));
  const __m256i biased = _mm256_or_si256(nibble, _mm256_set1_epi32(kExponent));
  constexpr float kBias = (1 << (23 - kAt)) + 8;
  return _mm256_sub_ps(_mm256_castsi256_ps(biased), _mm256_set1_ps(kBias));
}

Element broadcast(const uint32_t* x) {
  return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(*x)));
}

Sum multiply_add(Weight weight, Element element, Sum sum) {
  return _mm256_fmadd_ps(weight, element, sum);
}

Sum load_scale(const uint8_t* p) {
  const __m128i bf16 = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}

Sum scale_add(Sum sum, Sum scale, Sum total) { return _mm256_fmadd_ps(sum, scale, total); }

#include "arithmetic_roof.inl.h"
#include "matmul.inl.h"
#include "swiglu.inl.h"

}  // namespace

const ActivationKernels kAvx2Kernels = {kColumnsPerElement, matmul, swiglu, kTokensPerTile,
                                        arithmetic_roof};

}  // namespace hybridk2
