// AVX-512 with BF16: vdpbf16ps multiplies two columns of sixteen rows, accumulating in fp32.
#include <immintrin.h>

#include "kernels.h"

namespace hybridk2 {
namespace {

constexpr int kRowsPerVector = 16;
constexpr int kStepsPerLine = 4;
constexpr int kColumnsPerElement = 2;
constexpr int kRegisterTokens = 8;
constexpr bool kDecodesBetween = true;
constexpr int kStreamTokens = 8;
constexpr int kSideBySideSums = 8;

using Sum = __m512;
using Weight = __m512i;  // 32 x bf16
using Element = __m512i;
using Line = __m512i;

constexpr int vectors_at_once(int) { return 2; }

Sum zero() { return _mm512_setzero_ps(); }
Sum load(const float* p) { return _mm512_loadu_ps(p); }
void store(float* p, Sum value) { _mm512_storeu_ps(p, value); }
Line load_line(const uint8_t* p) { return _mm512_load_si512(p); }

// bf16 of -8..7, twice: vpermw looks at five bits of each index, and the fifth is a neighbour's.
alignas(64) constexpr uint16_t kValues[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

template <int Step>
Weight decode(Line line) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4 * Step), _mm512_load_si512(kValues));
}

Element broadcast(const uint32_t* x) { return _mm512_set1_epi32(static_cast<int>(*x)); }

Sum multiply_add(Weight weight, Element element, Sum sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)element);
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

const ActivationKernels kAvx512Bf16Kernels = {kColumnsPerElement, matmul, swiglu, kTokensPerTile,
                                              arithmetic_roof};

}  // namespace hybridk2
