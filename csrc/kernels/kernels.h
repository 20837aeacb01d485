// The contract between the engine and its kernels: how weights and activations lie in memory, and
// the functions that each instruction set supplies. Plain data and function pointers only, so that
// a kernel file, compiled for a newer CPU, has nothing that the linker could merge into the
// baseline.
//
// Weights
//
//   Panel: 16 output rows x 64 input columns, 576 bytes, 64-byte aligned: 8 lines of nibbles (512
//   bytes), then 2 x 16 bf16 scales. A group is 32 columns. In line 4g+q (group g, line q of it)
//   the 32-bit lane r belongs to row r; its 16-bit half p holds, from its lowest nibble up, columns
//   8q+p, 8q+p+2, 8q+p+4, 8q+p+6 of the group. A nibble is the value plus 8. So the column 8q+c is
//   found by shifting lane r right by 4 (c/2) + 16 (c%2), and the column pair (8q+2j, 8q+2j+1) of
//   all rows by shifting the 16-bit lanes right by 4 j: bf16 pairs, ready for vdpbf16ps or as rows
//   of an AMX B tile.
//
//   Strip: two panels side by side, 1152 bytes for 64 columns, blocks of 64 columns consecutive. It
//   gives 32 sums: of gate and up, the same 16 rows of both matrices, so that SwiGLU needs no other
//   strip; of down, 32 consecutive rows.
//
//   Rows and columns that the model does not have are filled with nibble 8 and scale 0: value 0.
//
// Activations
//
//   The tokens of one expert, split into tiles of tokens_per_tile (the last may be narrower):
//   kTokensPerTile, or 1 where AMX reads rows. An element is 32 bits: one column in fp32, or two
//   neighbouring columns in bf16. A tile of m tokens holds element e of token i at [e * m + i];
//   tiles follow each other without gaps. A tile of one token is therefore just its row.
//
// Arithmetic
//
//   y[r] = sum over groups of scale[r][group] * (sum over the group of value[r][c] * x[c])
//
//   Values are exact (bf16 holds -8..7), the inner sum and the outer one are fp32, each in
//   ascending order in one accumulator; but AMX's inner sum adds a group's even columns and its odd
//   columns apart, then both. Within one instruction set the order is the same for every number of
//   tokens, with and without AMX tiles, so a token's result does not depend, bit for bit, on what
//   else is in the call.
#pragma once

#include <cstdint>

namespace hybridk2 {

constexpr int kPanelRows = 16;
constexpr int kBlockColumns = 64;
constexpr int kGroupColumns = 32;
constexpr int kGroupsPerBlock = kBlockColumns / kGroupColumns;
constexpr int kLineBytes = 64;
constexpr int kLinesPerGroup = 4;
constexpr int kLineColumns = kGroupColumns / kLinesPerGroup;
constexpr int kPanelNibbleBytes = kPanelRows * kBlockColumns / 2;
constexpr int kPanelBytes = kPanelNibbleBytes + kPanelRows * kGroupsPerBlock * 2;
constexpr int kStripRows = 2 * kPanelRows;
constexpr int kStripBlockBytes = 2 * kPanelBytes;

// A multiple of what each instruction set holds in its registers (6 or 8), so that full tiles
// divide evenly.
constexpr int kTokensPerTile = 24;

// Scratch for one thread: unpacked weights of one strip and a few blocks, small enough for L1.
constexpr int kScratchBytes = 16 * 1024;

struct MatmulTask {
  const uint8_t* strips;  // num_strips x num_blocks x kStripBlockBytes
  int64_t num_strips;
  int64_t num_blocks;       // input columns / kBlockColumns
  const void* activations;  // tiles of num_tokens tokens, num_blocks * kBlockColumns columns
  int64_t num_tokens;
  float* sums;       // out: (num_strips, num_tokens, kStripRows), 64-byte aligned
  uint8_t* scratch;  // kScratchBytes, 64-byte aligned
  // Where the next task's strips lie, to be asked for ahead and not read; null: behind these.
  const uint8_t* next_strips = nullptr;
  // Where its activations lie, as if of as many tokens, to be asked for too; null: these again.
  const void* next_activations = nullptr;
};

struct SwigluTask {
  const float* sums;  // (num_tokens, kStripRows): 16 of gate, then 16 of up
  int64_t num_tokens;
  int64_t first_column;  // of the 16 columns this strip gives
  int64_t num_columns;   // of a token's activations, padding included
  bool round_to_bf16;    // else the product stays fp32
  void* activations;     // out: tiles of num_tokens tokens
};

// A loop of nothing but the kernels' multiplication, to measure what it reaches at best.
struct ArithmeticTask {
  const uint8_t* line;      // kLineBytes of nibbles, 64-byte aligned
  const uint32_t* element;  // of activations
  float* sums;              // in and out: kArithmeticSums, all numbers
  int64_t rounds;
};
constexpr int kArithmeticSums = 256;

// How far ahead of its use a weight line that is read as one stream is asked into L2: a matter of
// the processor, not of its instruction set, so dispatch.cc knows it.
extern const int64_t kStreamAheadBytes;

// The kernels for one precision of activations.
struct ActivationKernels {
  int columns_per_element;  // 2: bf16 pairs. 1: fp32
  void (*matmul)(const MatmulTask& task);
  void (*swiglu)(const SwigluTask& task);
  int tokens_per_tile = kTokensPerTile;
  int64_t (*arithmetic_roof)(const ArithmeticTask& task) = nullptr;  // returns FLOP; null: none
};

// Each is defined in the file of its instruction set and is that file's only external symbol.
// scalar, avx2 and avx512 compute in fp32 and take bf16 activations widened, which is exact.
extern const ActivationKernels kScalarKernels;
extern const ActivationKernels kAvx2Kernels;
extern const ActivationKernels kAvx512Kernels;
extern const ActivationKernels kAvx512Bf16Kernels;   // bf16 pairs only
extern const ActivationKernels kAmxKernels;          // bf16 pairs only
extern const ActivationKernels kAmxEmulatedKernels;  // amx's bits on any CPU, slowly

}  // namespace hybridk2
