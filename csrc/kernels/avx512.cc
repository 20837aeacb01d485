// AVX-512 (F, BW, VL, DQ): sixteen rows at a time in fp32.
#include <immintrin.h>

#include "kernels.h"

namespace hybridk2 {
namespace {

constexpr int kRowsPerVector = 16;
constexpr int kStepsPerLine = 8;
constexpr int kColumnsPerElement = 1;
constexpr int kRegisterTokens = 8;
constexpr bool kDecodesBetween = true;
constexpr int kStreamTokens = 4;
constexpr int kSideBySideSums = 8;

using Sum = __m512;
using Weight = __m512;
using Element = __m512;
using Line = __m512i;

constexpr int vectors_at_once(int) { return 2; }

Sum zero() { return _mm512_setzero_ps(); }
Sum load(const float* p) { return _mm512_loadu_ps(p); }
void store(float* p, Sum value) { _mm512_storeu_ps(p, value); }
Line load_line(const uint8_t* p) { return _mm512_load_si512(p); }

// vpermps looks at the low four bits of each index only: no mask is needed.
template <int Step>
Weight decode(Line line) {
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i index = _mm512_srli_epi32(line, 4 * (Step / 2) + 16 * (Step % 2));
  return _mm512_permutexvar_ps(index, values);
}

Element broadcast(const uint32_t* x) {
  return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*x)));
}

Sum multiply_add(Weight weight, Element element, Sum sum) {
  return _mm512_fmadd_ps(weight, element, sum);
}

Sum load_scale(const uint8_t* p) {
  const __m256i bf16 = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

Sum scale_add(Sum sum, Sum scale, Sum total) { return _mm512_fmadd_ps(sum, scale, total); }

#include "arithmetic_roof.inl.h"
#include "matmul.inl.h"
#include "swiglu.inl.h"

}  // namespace

const ActivationKernels kAvx512Kernels = {kColumnsPerElement, matmul, swiglu, kTokensPerTile,
                                          arithmetic_roof};

}  // namespace hybridk2
