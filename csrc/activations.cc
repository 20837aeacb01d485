#include "activations.h"

#include <cstring>

namespace hybridk2 {
namespace {

// Bits of one element of a row. Each form reads what its row holds, at any alignment.
struct Bf16Pair {
  static uint32_t element(const uint8_t* row, int64_t e) {
    uint32_t bits;
    std::memcpy(&bits, row + e * sizeof(bits), sizeof(bits));
    return bits;
  }
};

struct WidenedBf16 {
  static uint32_t element(const uint8_t* row, int64_t e) {
    uint16_t bits;
    std::memcpy(&bits, row + e * sizeof(bits), sizeof(bits));
    return uint32_t{bits} << 16;
  }
};

using Fp32 = Bf16Pair;  // 32 bits of the row as they stand, both

template <typename Form>
void gather(const void* const* rows, int num_rows, int64_t elements, uint32_t* tile) {
  for (int64_t e = 0; e < elements; ++e) {
    for (int i = 0; i < num_rows; ++i) {
      *tile++ = Form::element(static_cast<const uint8_t*>(rows[i]), e);
    }
  }
}

}  // namespace

void pack_tile(const void* const* rows, int num_rows, Precision precision, int64_t columns,
               int64_t padded_columns, int columns_per_element, uint32_t* tile) {
  const int64_t elements = columns / columns_per_element;
  if (precision == Precision::kFp32) {
    gather<Fp32>(rows, num_rows, elements, tile);
  } else if (columns_per_element == 2) {
    gather<Bf16Pair>(rows, num_rows, elements, tile);
  } else {
    gather<WidenedBf16>(rows, num_rows, elements, tile);
  }
  const int64_t padding = padded_columns / columns_per_element - elements;
  std::memset(tile + elements * num_rows, 0, sizeof(uint32_t) * padding * num_rows);
}

void add_weighted(const float* sums, float weight, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] += weight * sums[j];
}

}  // namespace hybridk2
