// What amx.inl.h needs beside tiles, in AVX-512 with BF16. Included inside an anonymous namespace.

constexpr int kRowsPerVector = 16;

using Sum = __m512;
using Weight = __m512i;  // 32 x bf16
using Elements = __m512i;
using Line = __m512i;

Sum zero() { return _mm512_setzero_ps(); }
Sum load(const float* p) { return _mm512_loadu_ps(p); }
void store(float* p, Sum value) { _mm512_storeu_ps(p, value); }
Line load_line(const uint8_t* p) { return _mm512_load_si512(p); }
void store_weight(uint8_t* p, Weight weight) { _mm512_store_si512(p, weight); }

// bf16 of -8..7, twice: vpermw looks at five bits of each index, and the fifth is a neighbour's.
alignas(64) constexpr uint16_t kValues[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

template <int Step>
Weight decode(Line line) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4 * Step), _mm512_load_si512(kValues));
}

// All even columns of a line lie in the low halves of its lanes, so that one low half, copied to
// both halves of the lane and shifted by two distances, gives a pair.
template <int Half>
Weight decode_two(Line copied) {
  constexpr int kFirst = 4 * (2 * Half), kSecond = kFirst + 4;
  const __m512i nibbles = _mm512_srlv_epi16(copied, _mm512_set1_epi32(kFirst << 16 | kSecond));
  return _mm512_permutexvar_epi16(nibbles, _mm512_load_si512(kValues));
}

// Lane i of every four gets the 16 bits from byte low + step i on, above them those from byte
// high + step i on.
__m512i shuffle(__m512i from, int low, int high, int step) {
  const auto lane = [&](int i) {
    return (low + step * i) | (low + 1 + step * i) << 8 | (high + step * i) << 16 |
           (high + 1 + step * i) << 24;
  };
  return _mm512_shuffle_epi8(
      from, _mm512_broadcast_i32x4(_mm_setr_epi32(lane(0), lane(1), lane(2), lane(3))));
}

template <int Half>
Weight even_weights(Line line) {
  return decode_two<Half>(shuffle(line, 0, 0, 4));
}

template <int Half>
Weight odd_weights(Line line) {
  return decode_two<Half>(shuffle(line, 2, 2, 4));
}

Elements load_elements(const uint32_t* x) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

template <int Half>
__m512i even_columns(Elements x) {
  return shuffle(x, 8 * Half + 4, 8 * Half, 0);
}

template <int Half>
__m512i odd_columns(Elements x) {
  return shuffle(x, 8 * Half + 6, 8 * Half + 2, 0);
}

Sum multiply_add(Weight weight, __m512i columns, Sum sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)columns);
}

Sum add_flushed(Sum a, Sum b) {
  constexpr int kPositiveZero = 0x02, kNegativeZero = 0x04, kDenormal = 0x20;
  const Sum sum = _mm512_add_ps(a, b);
  const __mmask16 vanishes = _mm512_fpclass_ps_mask(sum, kPositiveZero | kNegativeZero | kDenormal);
  return _mm512_maskz_mov_ps(_knot_mask16(vanishes), sum);
}

Sum load_scale(const uint8_t* p) {
  const __m256i bf16 = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

Sum scale_add(Sum sum, Sum scale, Sum total) { return _mm512_fmadd_ps(sum, scale, total); }
