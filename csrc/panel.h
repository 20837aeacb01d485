// From a checkpoint's INT4 matrices to strips and back; kernels/kernels.h says how a strip lies.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace hybridk2 {

// A matrix as the checkpoint holds it: nibble k, from the lowest, of word j of a row is column 8j +
// k, stored as value + 8; one bf16 scale for every 32 columns.
struct PackedMatrix {
  const uint32_t* words;   // (rows, columns / 8)
  const uint16_t* scales;  // (rows, columns / 32)
};

constexpr int64_t blocks_of(int64_t columns) {
  return (columns + kBlockColumns - 1) / kBlockColumns;
}

// Fills num_strips strips at `strips`: the first panel of strip s from rows first_row + s *
// row_step of `first`, the second likewise from `second`. columns is a multiple of 32.
struct StripSource {
  PackedMatrix matrix;
  int64_t first_row;
  int64_t row_step;
};
void pack_strips(const StripSource& first, const StripSource& second, int64_t num_strips,
                 int64_t columns, uint8_t* strips);

// The inverse, as fp32 values: row r of panel `panel` (0 or 1) of strip s goes to
// out + (first_row + s * row_step + r) * columns. Exact: 4 bits times bf16 fit into fp32.
struct StripTarget {
  float* matrix;
  int64_t first_row;
  int64_t row_step;
};
void unpack_strips(const uint8_t* strips, int panel, int64_t num_strips, int64_t columns,
                   const StripTarget& target);

}  // namespace hybridk2
