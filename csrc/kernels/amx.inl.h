// The matrix product over packed strips with AMX tiles, for bf16 pairs. Included inside an
// anonymous namespace, after
//
//   Tiles, kTileRows, kTileRowBytes   the eight tile registers, real (amx.cc) or their portable
//                            twin (emulated_tiles.inl.h)
//   Sum, Weight, Line, kRowsPerVector, and load_line, decode<step>, zero, load, store, load_scale,
//                            scale_add: as in matmul.inl.h
//   store_weight             16-bit pairs as they stand
//   Elements, load_elements  one token's columns of a line: four elements
//   even_weights<half>, odd_weights<half>, even_columns<half>, odd_columns<half>
//                            from a Line or from Elements, for all rows: column 4 half + p in the
//                            high half of a lane and 4 half + p + 2 in its low half; even: p = 0
//   multiply_add             vdpbf16ps, which adds the product of the high halves first
//   add_flushed              a + b; a result that is denormal or zero becomes +0
//
// One tile of weights is one group of one panel: 16 column pairs x 16 rows, which is what four
// lines of the panel unpack to. One tile of activations is 16 tokens x the same 16 pairs: rows of
// the activations as they lie, one token after the other. Their product is the group's sums for 16
// tokens x 16 rows; vectors then add it, times the group's scales, to the totals.
//
// A token's bits do not depend on how many tokens its expert has, because everything here adds in
// the order that Intel documents for tdpbf16ps into a cleared tile:
//
//   even = sum of value[2k] * x[2k],  odd = sum of value[2k+1] * x[2k+1],  k ascending,
//   group sum = even + odd
//
// each step one fused multiplication and addition, rounded to nearest even, denormals taken for
// zero and flushed to zero. Three or fewer tokens get it from vdpbf16ps, which rounds and flushes
// alike, on pairs of two even or of two odd columns.

constexpr int kColumnsPerElement = 2;
constexpr int kTokensPerRowTile = 1;  // activations: one token's row after the other's
constexpr int kVectorsPerPanel = kPanelRows / kRowsPerVector;
constexpr int kPanelsPerStrip = kStripRows / kPanelRows;
constexpr int kVectorsPerStrip = kPanelsPerStrip * kVectorsPerPanel;
constexpr int kElementsPerGroup = kGroupColumns / kColumnsPerElement;
constexpr int kElementsPerLine = kLineColumns / kColumnsPerElement;
static_assert(kElementsPerGroup == kTileRows && kPanelRows * 4 == kTileRowBytes);

// From this many tokens on, tiles. An estimate from Intel's figures, not yet measured: for a strip
// and a group, vector code takes about 32 + 32 cycles per token (shifts and vdpbf16ps on one port),
// tiles about 130 for any tokens up to 16 (unpacking 64, loads and stores of tiles 40, two products
// of 16 in part behind them). It changes no result.
constexpr int64_t kFewestTileTokens = 4;

constexpr int nibble_offset(int vector) {
  return vector / kVectorsPerPanel * kPanelBytes + vector % kVectorsPerPanel * kRowsPerVector * 4;
}

constexpr int scale_offset(int vector, int group) {
  return vector / kVectorsPerPanel * kPanelBytes + kPanelNibbleBytes + group * kPanelRows * 2 +
         vector % kVectorsPerPanel * kRowsPerVector * 2;
}

// Few tokens: weights go straight from memory into registers.

template <int M>
struct FewTokens {
  Sum even[M][kVectorsPerStrip];
  Sum odd[M][kVectorsPerStrip];

  void clear() {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectorsPerStrip; ++v) even[i][v] = odd[i][v] = zero();
    }
  }

  // Half of a line's columns: two even and two odd ones.
  template <int Half>
  void add(const Line (&line)[kVectorsPerStrip], const Elements (&x)[M]) {
    Weight weight_even[kVectorsPerStrip], weight_odd[kVectorsPerStrip];
#pragma GCC unroll 16
    for (int v = 0; v < kVectorsPerStrip; ++v) {
      weight_even[v] = even_weights<Half>(line[v]);
      weight_odd[v] = odd_weights<Half>(line[v]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const auto x_even = even_columns<Half>(x[i]), x_odd = odd_columns<Half>(x[i]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectorsPerStrip; ++v) {
        even[i][v] = multiply_add(weight_even[v], x_even, even[i][v]);
        odd[i][v] = multiply_add(weight_odd[v], x_odd, odd[i][v]);
      }
    }
  }
};

// One strip for M tokens, row i of the activations at x + i * row_elements.
template <int M>
void multiply_few(const uint8_t* strip, int64_t num_blocks, const uint32_t* x, float* sums) {
  const int64_t row_elements = num_blocks * kGroupsPerBlock * kElementsPerGroup;
  Sum total[M][kVectorsPerStrip];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectorsPerStrip; ++v) total[i][v] = zero();
  }
  for (int64_t block = 0; block < num_blocks; ++block) {
    const uint8_t* strip_block = strip + block * kStripBlockBytes;
#pragma GCC unroll 18
    for (int byte = 0; byte < kStripBlockBytes; byte += kLineBytes) {
      __builtin_prefetch(strip_block + kStreamAheadBytes + byte, 0, 2);
    }
    for (int group = 0; group < kGroupsPerBlock; ++group) {
      FewTokens<M> acc;
      acc.clear();
      for (int q = 0; q < kLinesPerGroup; ++q) {
        Line line[kVectorsPerStrip];
#pragma GCC unroll 16
        for (int v = 0; v < kVectorsPerStrip; ++v) {
          line[v] =
              load_line(strip_block + nibble_offset(v) + (group * kLinesPerGroup + q) * kLineBytes);
        }
        Elements elements[M];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) elements[i] = load_elements(x + i * row_elements);
        acc.template add<0>(line, elements);
        acc.template add<1>(line, elements);
        x += kElementsPerLine;
      }
#pragma GCC unroll 16
      for (int v = 0; v < kVectorsPerStrip; ++v) {
        const Sum scale = load_scale(strip_block + scale_offset(v, group));
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
          total[i][v] = scale_add(add_flushed(acc.even[i][v], acc.odd[i][v]), scale, total[i][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectorsPerStrip; ++v) {
      store(sums + i * kStripRows + v * kRowsPerVector, total[i][v]);
    }
  }
}

// Many tokens: a chunk of columns of one strip is unpacked into tiles once and meets all tokens.

constexpr int kTileBytes = kTileRows * kTileRowBytes;
constexpr int kBlockTiles = kGroupsPerBlock * kPanelsPerStrip;
// Scratch holds a chunk's tiles of weights, then as many of sums.
constexpr int kBlocksPerChunk = kScratchBytes / (2 * kBlockTiles * kTileBytes);
static_assert(kBlocksPerChunk >= 1);

// Into [group][panel] tiles: row k of each is the pair of columns (2k, 2k + 1) of 16 rows.
void unpack_block(const uint8_t* strip_block, uint8_t* tiles) {
  for (int group = 0; group < kGroupsPerBlock; ++group) {
    for (int v = 0; v < kVectorsPerStrip; ++v) {
      uint8_t* out = tiles + (group * kPanelsPerStrip + v / kVectorsPerPanel) * kTileBytes +
                     v % kVectorsPerPanel * kRowsPerVector * 4;
      const uint8_t* lines = strip_block + nibble_offset(v) + group * kLinesPerGroup * kLineBytes;
      for (int q = 0; q < kLinesPerGroup; ++q) {
        const Line line = load_line(lines + q * kLineBytes);
        __builtin_prefetch(lines + q * kLineBytes + kStreamAheadBytes, 0, 2);
        store_weight(out + (q * kElementsPerLine + 0) * kTileRowBytes, decode<0>(line));
        store_weight(out + (q * kElementsPerLine + 1) * kTileRowBytes, decode<1>(line));
        store_weight(out + (q * kElementsPerLine + 2) * kTileRowBytes, decode<2>(line));
        store_weight(out + (q * kElementsPerLine + 3) * kTileRowBytes, decode<3>(line));
      }
    }
  }
}

// The eight tile registers: weights of both panels; activations and sums of 16 tokens; the same for
// the tokens that are left over, with fewer rows.
constexpr int kWeights0 = 0, kWeights1 = 1;
constexpr int kActivations = 2, kSums0 = 3, kSums1 = 4;
constexpr int kLastActivations = 5, kLastSums0 = 6, kLastSums1 = 7;

// Each group's sums, not yet scaled, for the tokens of one tile: [group][panel] tiles of tokens x
// rows. x: the first group of the first token.
template <int kX, int kY0, int kY1>
void multiply_groups(Tiles& tiles, const uint8_t* weights, int64_t num_groups, const uint32_t* x,
                     int64_t row_elements, float* group_sums) {
  constexpr int kTileFloats = kTileBytes / 4;
  for (int64_t group = 0; group < num_groups; ++group) {
    tiles.load<kX>(x + group * kElementsPerGroup, row_elements * 4);
    tiles.load<kWeights0>(weights, kTileRowBytes);
    tiles.zero<kY0>();
    tiles.multiply_add<kY0, kX, kWeights0>();
    tiles.store<kY0>(group_sums, kTileRowBytes);
    tiles.load<kWeights1>(weights + kTileBytes, kTileRowBytes);
    tiles.zero<kY1>();
    tiles.multiply_add<kY1, kX, kWeights1>();
    tiles.store<kY1>(group_sums + kTileFloats, kTileRowBytes);
    weights += kPanelsPerStrip * kTileBytes;
    group_sums += kPanelsPerStrip * kTileFloats;
  }
}

// sums[token] += scale * group sum, over the groups of kBlocks blocks in ascending order.
template <int kBlocks>
void add_scaled(const uint8_t* strip_blocks, const float* group_sums, int64_t tokens, float* sums) {
  constexpr int kGroups = kBlocks * kGroupsPerBlock;
  for (int v = 0; v < kVectorsPerStrip; ++v) {
    Sum scale[kGroups];
#pragma GCC unroll 16
    for (int g = 0; g < kGroups; ++g) {
      scale[g] = load_scale(strip_blocks + g / kGroupsPerBlock * kStripBlockBytes +
                            scale_offset(v, g % kGroupsPerBlock));
    }
    const float* from = group_sums + v / kVectorsPerPanel * (kTileBytes / 4) +
                        v % kVectorsPerPanel * kRowsPerVector;
    float* to = sums + v * kRowsPerVector;
#pragma GCC unroll 1  // 16 copies, one for each number of tokens, would fill the micro-op cache
    for (int64_t i = 0; i < tokens; ++i) {
      Sum total = load(to + i * kStripRows);
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g) {
        const float* sum = from + g * kPanelsPerStrip * (kTileBytes / 4) + i * kPanelRows;
        total = scale_add(load(sum), scale[g], total);
      }
      store(to + i * kStripRows, total);
    }
  }
}

// `blocks` blocks of one strip, at most a chunk, for all tokens. x: the chunk's first element of
// the first token. sums: (num_tokens, kStripRows).
void multiply_chunk(Tiles& tiles, const uint8_t* strip_blocks, int64_t blocks, const uint32_t* x,
                    int64_t row_elements, int64_t num_tokens, uint8_t* scratch, float* sums) {
  float* group_sums =
      reinterpret_cast<float*>(scratch + kBlocksPerChunk * kBlockTiles * kTileBytes);
  for (int64_t b = 0; b < blocks; ++b) {
    unpack_block(strip_blocks + b * kStripBlockBytes, scratch + b * kBlockTiles * kTileBytes);
  }
  for (int64_t begin = 0; begin < num_tokens; begin += kTileRows) {
    const int64_t left = num_tokens - begin;
    const int64_t tokens = left < kTileRows ? left : kTileRows;
    const uint32_t* tile_x = x + begin * row_elements;
    if (tokens == kTileRows) {
      multiply_groups<kActivations, kSums0, kSums1>(tiles, scratch, blocks * kGroupsPerBlock,
                                                    tile_x, row_elements, group_sums);
    } else {
      multiply_groups<kLastActivations, kLastSums0, kLastSums1>(
          tiles, scratch, blocks * kGroupsPerBlock, tile_x, row_elements, group_sums);
    }
    float* tile_sums = sums + begin * kStripRows;
    if (blocks == kBlocksPerChunk) {
      add_scaled<kBlocksPerChunk>(strip_blocks, group_sums, tokens, tile_sums);
      continue;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      add_scaled<1>(strip_blocks + b * kStripBlockBytes,
                    group_sums + b * kBlockTiles * (kTileBytes / 4), tokens, tile_sums);
    }
  }
}

void multiply_tiles(const MatmulTask& task) {
  __builtin_memset(task.sums, 0, sizeof(float) * task.num_strips * task.num_tokens * kStripRows);
  const uint8_t full = kTileRows, last = static_cast<uint8_t>(task.num_tokens % kTileRows);
  Tiles tiles({full, full, full, full, full, last, last, last});
  const int64_t row_elements = task.num_blocks * kGroupsPerBlock * kElementsPerGroup;
  for (int64_t block = 0; block < task.num_blocks; block += kBlocksPerChunk) {
    const int64_t left = task.num_blocks - block;
    const int64_t blocks = left < kBlocksPerChunk ? left : kBlocksPerChunk;
    const uint32_t* x = static_cast<const uint32_t*>(task.activations) +
                        block * kGroupsPerBlock * kElementsPerGroup;
    for (int64_t s = 0; s < task.num_strips; ++s) {
      multiply_chunk(tiles, task.strips + (s * task.num_blocks + block) * kStripBlockBytes, blocks,
                     x, row_elements, task.num_tokens, task.scratch,
                     task.sums + s * task.num_tokens * kStripRows);
    }
  }
}

void matmul(const MatmulTask& task) {
  if (task.num_tokens >= kFewestTileTokens) return multiply_tiles(task);
  constexpr decltype(&multiply_few<1>) kMultiplyFew[] = {multiply_few<1>, multiply_few<2>,
                                                         multiply_few<3>};
  static_assert(kFewestTileTokens == 4);
  for (int64_t s = 0; s < task.num_strips; ++s) {
    kMultiplyFew[task.num_tokens - 1](task.strips + s * task.num_blocks * kStripBlockBytes,
                                      task.num_blocks,
                                      static_cast<const uint32_t*>(task.activations),
                                      task.sums + s * task.num_tokens * kStripRows);
  }
}
