// Rows of a call's activations, gathered into the tiles that kernels read (kernels/kernels.h).
#pragma once

#include <cstdint>

namespace hybridk2 {

enum class Precision { kBf16, kFp32 };

constexpr int64_t bytes_of(Precision precision) { return precision == Precision::kBf16 ? 2 : 4; }

// Gathers num_rows rows (at most kTokensPerTile) of `columns` columns, a multiple of 32, into one
// tile of padded_columns, zeros behind the last column. bf16 rows become bf16 pairs when
// columns_per_element is 2 and are widened to fp32, which is exact, when it is 1; fp32 rows need 1.
void pack_tile(const void* const* rows, int num_rows, Precision precision, int64_t columns,
               int64_t padded_columns, int columns_per_element, uint32_t* tile);

// out[j] += weight * sums[j], product and sum rounded separately, the same on every machine.
void add_weighted(const float* sums, float weight, int64_t count, float* out);

}  // namespace hybridk2
