#include "activations.h"

#include <emmintrin.h>

#include <cstring>

namespace hybridk2 {
namespace {

constexpr int kFour = 4;

// Four neighbouring elements of a row, one in each 32-bit lane. Each form reads what its row holds,
// at any alignment.
struct Words {  // fp32 or pairs of bf16: 32 bits as they stand
  static __m128i four(const uint8_t* row, int64_t element) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + element * 4));
  }
};

struct WidenedBf16 {
  static __m128i four(const uint8_t* row, int64_t element) {
    const __m128i bf16 = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + element * 2));
    return _mm_unpacklo_epi16(_mm_setzero_si128(), bf16);
  }
};

// The lowest `count` lanes.
void store_lanes(uint32_t* to, __m128i lanes, int64_t count) {
  if (count >= kFour) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), lanes);
    return;
  }
  uint32_t words[kFour];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = words[i];
}

// Elements [first, first + 4) of up to four rows, turned so that each element's rows stand side by
// side. to: where the first row of the first element goes; the next element stands num_rows on.
template <typename Form>
void gather_square(const void* const* rows, int64_t count, int64_t first, int64_t num_rows,
                   uint32_t* to) {
  const auto four = [&](int64_t row) {
    return Form::four(static_cast<const uint8_t*>(rows[row < count ? row : 0]), first);
  };
  const __m128i a = four(0), b = four(1), c = four(2), d = four(3);
  const __m128i ab_low = _mm_unpacklo_epi32(a, b), ab_high = _mm_unpackhi_epi32(a, b);
  const __m128i cd_low = _mm_unpacklo_epi32(c, d), cd_high = _mm_unpackhi_epi32(c, d);
  store_lanes(to, _mm_unpacklo_epi64(ab_low, cd_low), count);
  store_lanes(to + num_rows, _mm_unpackhi_epi64(ab_low, cd_low), count);
  store_lanes(to + 2 * num_rows, _mm_unpacklo_epi64(ab_high, cd_high), count);
  store_lanes(to + 3 * num_rows, _mm_unpackhi_epi64(ab_high, cd_high), count);
}

// elements: a multiple of 16, as columns are one of 32. So many at a time are a cache line of every
// row, whose part of the tile stays in L1 meanwhile.
template <typename Form>
void gather(const void* const* rows, int64_t num_rows, int64_t elements, uint32_t* tile) {
  constexpr int64_t kAtOnce = 16;
  for (int64_t begin = 0; begin < elements; begin += kAtOnce) {
    for (int64_t row = 0; row < num_rows; row += kFour) {
      for (int64_t e = begin; e < begin + kAtOnce; e += kFour) {
        if (num_rows == 1) {
          store_lanes(tile + e, Form::four(static_cast<const uint8_t*>(rows[0]), e), kFour);
        } else {
          gather_square<Form>(rows + row, num_rows - row, e, num_rows, tile + e * num_rows + row);
        }
      }
    }
  }
}

}  // namespace

void pack_tile(const void* const* rows, int num_rows, Precision precision, int64_t columns,
               int64_t padded_columns, int columns_per_element, uint32_t* tile) {
  const int64_t elements = columns / columns_per_element;
  if (precision == Precision::kBf16 && columns_per_element == 1) {
    gather<WidenedBf16>(rows, num_rows, elements, tile);
  } else {
    gather<Words>(rows, num_rows, elements, tile);
  }
  const int64_t padding = padded_columns / columns_per_element - elements;
  std::memset(tile + elements * num_rows, 0, sizeof(uint32_t) * padding * num_rows);
}

void add_weighted(const float* sums, float weight, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] += weight * sums[j];
}

}  // namespace hybridk2
