// AMX: tdpbf16ps multiplies 16 tokens with 16 rows over 32 columns, accumulating in fp32. Compiled
// into every build, run only where dispatch.cc has found the tiles, the permission and the bits.
#include <immintrin.h>

#include "kernels.h"

namespace hybridk2 {
namespace {

#include "amx_vectors.inl.h"

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

// The tile registers of this thread, configured while the object lives. Written in assembly: the
// intrinsics of GCC 12 tell the compiler neither that a tile load reads memory nor that loading a
// configuration reads all of it, so stores before them may move or vanish.
class Tiles {
 public:
  struct Rows {
    uint8_t of_tile[8];  // 0: the tile is not used
  };

  explicit Tiles(const Rows& rows) {
    Configuration configuration = {};
    configuration.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      configuration.rows[tile] = rows.of_tile[tile];
      configuration.row_bytes[tile] = rows.of_tile[tile] > 0 ? kTileRowBytes : 0;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(configuration) : "memory");
  }
  // Back to the initial state, which the operating system need not save.
  ~Tiles() { __asm__ volatile("tilerelease" : : : "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  void load(const void* rows, int64_t stride_bytes) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0"
                     :
                     : "i"(kTile), "r"(rows), "r"(stride_bytes)
                     : "memory");
  }
  template <int kTile>
  void store(void* rows, int64_t stride_bytes) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)"
                     :
                     : "i"(kTile), "r"(rows), "r"(stride_bytes)
                     : "memory");
  }
  template <int kTile>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // kY (tokens x rows) += kX (tokens x column pairs) * kWeights (column pairs x rows).
  template <int kY, int kX, int kWeights>
  void multiply_add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kY), "i"(kX), "i"(kWeights));
  }

 private:
  struct Configuration {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Configuration) == 64);
};

#include "amx.inl.h"
#include "swiglu.inl.h"

// What tdpbf16ps could reach at best: full tiles, in four independent chains.
int64_t arithmetic_roof(const ArithmeticTask& task) {
  const uint8_t full = kTileRows;
  Tiles tiles({full, full, full, full, full, full, full, full});
  uint32_t pairs[kTileRows][kTileRowBytes / 4];
  for (auto& row : pairs) {
    for (uint32_t& pair : row) pair = *task.element;
  }
  tiles.load<0>(pairs, kTileRowBytes);
  tiles.load<1>(pairs, kTileRowBytes);
  tiles.zero<4>();
  tiles.zero<5>();
  tiles.zero<6>();
  tiles.zero<7>();
  for (int64_t round = 0; round < task.rounds; ++round) {
    tiles.multiply_add<4, 0, 1>();
    tiles.multiply_add<5, 0, 1>();
    tiles.multiply_add<6, 0, 1>();
    tiles.multiply_add<7, 0, 1>();
  }
  return task.rounds * 4 * kTileRows * kPanelRows * kGroupColumns * 2;
}

}  // namespace

const ActivationKernels kAmxKernels = {kColumnsPerElement, matmul, swiglu<kTokensPerRowTile>,
                                       kTokensPerRowTile, arithmetic_roof};

}  // namespace hybridk2
