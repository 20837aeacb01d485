// The matrix product over packed strips, shared by all instruction sets. Included inside an
// anonymous namespace, after the instruction set's primitives:
//
//   Sum          accumulator: kRowsPerVector rows x fp32
//   Weight       what one step multiplies: kRowsPerVector rows x one element's columns
//   Line         kRowsPerVector rows of a 64-byte line of nibbles
//   kStepsPerLine            elements per line: 4 (bf16 pairs) or 8 (fp32)
//   kRegisterTokens          most tokens held in accumulators at once: 6 or 8
//   kDecodesBetween          whether registers are left for decoding between multiplications
//   kStreamTokens            up to so many tokens decode faster than memory gives weights
//   kSideBySideSums          up to so many accumulators, both groups of a block run side by side
//   vectors_at_once(tokens)  row vectors held in accumulators beside that many tokens
//   load_line, decode<step>, multiply_add, scale_add, zero, load, store
//
// A register tile is `M` tokens x `V` row vectors of a strip. The first one of a strip decodes its
// weights on the fly, between its multiplications, where decoding is nearly free; when others
// follow it leaves what it decoded in scratch for them. So there is no crossover to tune, and every
// way gives the same bits.

constexpr int kVectorsPerStrip = kStripRows / kRowsPerVector;
constexpr int kVectorsPerPanel = kPanelRows / kRowsPerVector;
constexpr int kElementsPerGroup = kLinesPerGroup * kStepsPerLine;
constexpr int kElementsPerBlock = kGroupsPerBlock * kElementsPerGroup;

// How far ahead of its use a weight line is asked into L2 where multiplying sets the pace: by a
// strip that is read in one go, and by one that takes turns with others after every chunk.
constexpr int kAheadBytes = 20 * kStripBlockBytes;
constexpr int kChunkAheadBytes = 8 * kStripBlockBytes;

// Where memory sets the pace, kStreamAheadBytes. And a prefetch that finds no free miss buffer is
// dropped, and a line that was dropped stalls everything behind it. So there each line is asked for
// again and again, into L1, these many panels ahead; what is there or under way costs nothing but
// the instruction. As non-temporal data, which is read once: it passes L2 by and leaves there what
// was in it, the code that submits the next layer for one. One token, two threads of a 2-core Zen 5
// (2026-11), share of the best plain read loop where memory gives 73 GB/s and where it gives 44:
// temporal 24 16 12 8 5 3 0.98 and 0.93; the same non-temporal 1.01 and 0.94; these 1.03 and 0.95;
// ten 1.04 and 0.95, twelve 1.01 (each within 0.01).
constexpr int kPanelsAheadInL1[] = {32, 24, 18, 14, 11, 8, 5, 3};

// How far ahead activations are asked into L1 by tiles that do nothing but multiply: 12 elements of
// a full tile. 192 tokens, one core of a Zen 4: 0.86 of the vdpbf16ps roof without, 0.89 with. The
// last strip asks for the next chunk instead, which comes from L3 or DRAM: the first strip would
// wait for it.
constexpr int kPrefetchElements = 12 * kTokensPerTile;

constexpr int nibble_offset(int vector) {
  return vector / kVectorsPerPanel * kPanelBytes + vector % kVectorsPerPanel * kRowsPerVector * 4;
}

constexpr int scale_offset(int vector, int group) {
  return vector / kVectorsPerPanel * kPanelBytes + kPanelNibbleBytes + group * kPanelRows * 2 +
         vector % kVectorsPerPanel * kRowsPerVector * 2;
}

// Where a register tile finds its weights.
enum class Source {
  kPacked,      // in the strip
  kPackedKept,  // in the strip; decoded ones are left in scratch
  kUnpacked,    // in scratch
};

// One line of a group: acc[i][v] += sum over the line's columns, in ascending order. kept: where
// the group's first decoded weight goes, [element][vector of the strip].
template <int M, int V, bool kKeep>
struct PackedGroup {
  const uint8_t* strip_block;
  int first_vector;
  int group;
  Weight* kept;

  template <int Step>
  __attribute__((always_inline)) static void step(const Line (&line)[V], Weight* keep,
                                                  const uint32_t* x, int64_t x_stride,
                                                  Sum (&acc)[M][V]) {
    Weight weight[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      weight[v] = decode<Step>(line[v]);
      if constexpr (kKeep) keep[Step * kVectorsPerStrip + v] = weight[v];
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Element element = broadcast(x + Step * x_stride + i);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[i][v] = multiply_add(weight[v], element, acc[i][v]);
    }
  }

  __attribute__((always_inline)) void accumulate_line(int q, const uint32_t* x, int64_t x_stride,
                                                      Sum (&acc)[M][V]) const {
    Weight* keep = kKeep ? kept + q * kStepsPerLine * kVectorsPerStrip : nullptr;
    Line line[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      line[v] = load_line(strip_block + nibble_offset(first_vector + v) +
                          (group * kLinesPerGroup + q) * kLineBytes);
    }
    step<0>(line, keep, x, x_stride, acc);
    step<1>(line, keep, x, x_stride, acc);
    step<2>(line, keep, x, x_stride, acc);
    step<3>(line, keep, x, x_stride, acc);
    if constexpr (kStepsPerLine == 8) {
      step<4>(line, keep, x, x_stride, acc);
      step<5>(line, keep, x, x_stride, acc);
      step<6>(line, keep, x, x_stride, acc);
      step<7>(line, keep, x, x_stride, acc);
    }
  }
};

// The same for element e of a group from decoded weights, those of the group: [element][vector].
template <int M, int V>
struct UnpackedGroup {
  const Weight* weights;

  // x_ahead: bytes from x to the activations that are asked for.
  __attribute__((always_inline)) void accumulate_element(int e, const uint32_t* x, int64_t x_ahead,
                                                         Sum (&acc)[M][V]) const {
    __builtin_prefetch(reinterpret_cast<const uint8_t*>(x) + x_ahead, 0, 3);
    Weight weight[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) weight[v] = weights[e * kVectorsPerStrip + v];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Element element = broadcast(x + i);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[i][v] = multiply_add(weight[v], element, acc[i][v]);
    }
  }
};

// Asks for kCount lines from `ahead` on into L2; in a stream, for those behind `lines` into L1.
template <bool kStream, int kCount>
__attribute__((always_inline)) inline void prefetch_lines(const uint8_t* lines,
                                                          const uint8_t* ahead) {
#pragma GCC unroll 16
  for (int line = 0; line < kCount * kLineBytes; line += kLineBytes) {
    __builtin_prefetch(ahead + line, 0, 2);
    if constexpr (kStream) {
      // Hides from GCC that all these addresses are known before the loop: it would keep them, on
      // the stack, and many a prefetch would wait for a load. One token from cache: 23 GB/s per
      // core instead of 51.
      asm("" : "+r"(lines));
#pragma GCC unroll 16
      for (const int panels : kPanelsAheadInL1) {
        __builtin_prefetch(lines + panels * kPanelBytes + line, 0, 0);
      }
    }
  }
}

// Adds blocks [0, num_blocks) of one register tile to sums (row i at sums + i * kStripRows).
// x: element e of token i at [e * x_stride + i]. unpacked: scratch for num_blocks decoded blocks;
// kPacked leaves it alone and takes any number of blocks. ahead: what is to come, to be asked for
// meanwhile: as many blocks, or for kUnpacked as many elements.
//
// Begins on a page of code: a loop that lies in two pages loses up to 4% where weights come from
// DRAM, none where they come from cache; why is not known. 256 tokens, two threads of a 2-core Zen
// 5 (2026-11), the same code in nine places: 0.99 to 1.02 times the speed of the first across two
// pages, 1.02 to 1.03 within one.
template <int M, int V, Source kSource>
__attribute__((aligned(4096))) void multiply_register_tile(const uint8_t* strip,
                                                           const uint8_t* ahead, Weight* unpacked,
                                                           int64_t num_blocks, int first_vector,
                                                           const uint32_t* x, int64_t x_stride,
                                                           float* sums) {
  // Each accumulator is one chain of dependent multiplications. Few tokens make few chains, too few
  // to hide their latency: then the block's two groups run side by side.
  constexpr int kGroups = M * V <= kSideBySideSums ? 2 : 1;
  constexpr bool kUnpacked = kSource == Source::kUnpacked;
  constexpr bool kStream = kSource == Source::kPacked && M <= kStreamTokens;
  // What this tile reads of a later block is asked for in even shares, one with each line of
  // nibbles.
  constexpr int kLines = kStripBlockBytes * V / kVectorsPerStrip / kLineBytes;
  constexpr int kLinesPerBlock = kGroupsPerBlock * kLinesPerGroup;
  Sum total[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      total[i][v] = load(sums + i * kStripRows + (first_vector + v) * kRowsPerVector);
    }
  }
  for (int64_t block = 0; block < num_blocks; ++block) {
    const uint8_t* strip_block = strip + block * kStripBlockBytes;
    const uint8_t* lines = strip_block + nibble_offset(first_vector);
    const uint8_t* later = ahead + (lines - strip);
    if constexpr (!kUnpacked) prefetch_lines<kStream, kLines % kLinesPerBlock>(lines, later);
    for (int group = 0; group < kGroupsPerBlock; group += kGroups) {
      Sum acc[kGroups][M][V];
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) acc[g][i][v] = zero();
        }
      }
      const uint32_t* xg = x + (block * kGroupsPerBlock + group) * kElementsPerGroup * x_stride;
      // Lines and elements are not unrolled but for few tokens: with twelve the code would outgrow
      // the micro-op cache (a tenth slower on Zen 4, 2026-11).
      Weight* decoded = unpacked + first_vector;
      if constexpr (kSource != Source::kPacked) {
        decoded += (block * kElementsPerBlock + group * kElementsPerGroup) * kVectorsPerStrip;
      }
      constexpr int kGroupWeights = kElementsPerGroup * kVectorsPerStrip;
      if constexpr (kUnpacked) {
        for (int e = 0; e < kElementsPerGroup; ++e) {
#pragma GCC unroll 2
          for (int g = 0; g < kGroups; ++g) {
            UnpackedGroup<M, V>{decoded + g * kGroupWeights}.accumulate_element(
                e, xg + (g * kElementsPerGroup + e) * x_stride,
                ahead - reinterpret_cast<const uint8_t*>(x), acc[g]);
          }
        }
      } else {
        const auto multiply_lines = [&](int q) __attribute__((always_inline)) {
#pragma GCC unroll 2
          for (int g = 0; g < kGroups; ++g) {
            constexpr int kShare = kLines / kLinesPerBlock;
            const int line = (group + g) * kLinesPerGroup + q;
            const int offset = (kLines % kLinesPerBlock + line * kShare) * kLineBytes;
            prefetch_lines<kStream, kShare>(lines + offset, later + offset);
            const uint32_t* xq = xg + (g * kLinesPerGroup + q) * kStepsPerLine * x_stride;
            PackedGroup<M, V, kSource == Source::kPackedKept>{strip_block, first_vector, group + g,
                                                              decoded + g * kGroupWeights}
                .accumulate_line(q, xq, x_stride, acc[g]);
          }
        };
        if constexpr (kGroups == 2) {
          multiply_lines(0);
          multiply_lines(1);
          multiply_lines(2);
          multiply_lines(3);
        } else {
          for (int q = 0; q < kLinesPerGroup; ++q) multiply_lines(q);
        }
      }
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          const Sum scale = load_scale(strip_block + scale_offset(first_vector + v, group + g));
#pragma GCC unroll 16
          for (int i = 0; i < M; ++i) total[i][v] = scale_add(acc[g][i][v], scale, total[i][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      store(sums + i * kStripRows + (first_vector + v) * kRowsPerVector, total[i][v]);
    }
  }
}

// All row vectors of the strip for M tokens.
template <int M, Source kSource>
void multiply_tokens(const uint8_t* strip, const uint8_t* ahead, Weight* unpacked,
                     int64_t num_blocks, const uint32_t* x, int64_t x_stride, float* sums) {
  constexpr int V = vectors_at_once(M);
  static_assert(kVectorsPerStrip % V == 0);
  for (int first_vector = 0; first_vector < kVectorsPerStrip; first_vector += V) {
    multiply_register_tile<M, V, kSource>(strip, ahead, unpacked, num_blocks, first_vector, x,
                                          x_stride, sums);
  }
}

using MultiplyTokens = void (*)(const uint8_t*, const uint8_t*, Weight*, int64_t, const uint32_t*,
                                int64_t, float*);

template <Source kSource>
MultiplyTokens multiply_tokens_for(int64_t tokens) {
  static_assert(kRegisterTokens == 6 || kRegisterTokens == 8);
  switch (tokens) {
    case 1:
      return multiply_tokens<1, kSource>;
    case 2:
      return multiply_tokens<2, kSource>;
    case 3:
      return multiply_tokens<3, kSource>;
    case 4:
      return multiply_tokens<4, kSource>;
    case 5:
      return multiply_tokens<5, kSource>;
    case 6:
      return multiply_tokens<6, kSource>;
    case 7:
      return multiply_tokens<kRegisterTokens - 1, kSource>;
    default:
      return multiply_tokens<kRegisterTokens, kSource>;
  }
}

constexpr int kUnpackedBlockBytes =
    kElementsPerBlock * kVectorsPerStrip * static_cast<int>(sizeof(Weight));
constexpr int kBlocksPerChunk = kScratchBytes / kUnpackedBlockBytes;
static_assert(kBlocksPerChunk >= 1);

template <int Step>
void keep_step(const Line& line, Weight* kept) {
  *kept = decode<Step>(line);
  if constexpr (Step + 1 < kStepsPerLine) keep_step<Step + 1>(line, kept + kVectorsPerStrip);
}

// Decodes blocks of a strip into scratch, asks for as many from `ahead` on and does nothing else.
void unpack_blocks(const uint8_t* strip_blocks, const uint8_t* ahead, int64_t blocks,
                   Weight* unpacked) {
  for (int64_t block = 0; block < blocks; ++block) {
    for (int row_line = 0; row_line < kGroupsPerBlock * kLinesPerGroup; ++row_line) {
      for (int v = 0; v < kVectorsPerStrip; ++v) {
        const int line = nibble_offset(v) + row_line * kLineBytes;
        __builtin_prefetch(ahead + line, 0, 2);
        keep_step<0>(load_line(strip_blocks + line), unpacked + v);
      }
      unpacked += kStepsPerLine * kVectorsPerStrip;
    }
    strip_blocks += kStripBlockBytes;
    ahead += kStripBlockBytes;
  }
}

// Several register tiles: for each chunk of columns, every strip is decoded once and meets every
// token while the chunk of activations stays in L2. A tile of activations is cut into register
// tiles of nearly equal width.
void multiply_many_tokens(const MatmulTask& task) {
  const uint32_t* x = static_cast<const uint32_t*>(task.activations);
  const uint32_t* next_x = static_cast<const uint32_t*>(
      task.next_activations != nullptr ? task.next_activations : task.activations);
  Weight* unpacked = reinterpret_cast<Weight*>(task.scratch);
  const int64_t row_elements = task.num_blocks * kElementsPerBlock;
  const int64_t strip_bytes = task.num_blocks * kStripBlockBytes;
  const uint8_t* next =
      task.next_strips != nullptr ? task.next_strips : task.strips + task.num_strips * strip_bytes;
  for (int64_t block = 0; block < task.num_blocks; block += kBlocksPerChunk) {
    const int64_t left = task.num_blocks - block;
    const int64_t blocks = left < kBlocksPerChunk ? left : kBlocksPerChunk;
    for (int64_t s = 0; s < task.num_strips; ++s) {
      const uint8_t* chunk = task.strips + s * strip_bytes + block * kStripBlockBytes;
      // Behind the last chunk of a strip comes the first one, of the next task.
      const uint8_t* later =
          left * kStripBlockBytes > kChunkAheadBytes
              ? chunk + kChunkAheadBytes
              : next + s * strip_bytes + kChunkAheadBytes - left * kStripBlockBytes;
      float* sums = task.sums + s * task.num_tokens * kStripRows;
      if constexpr (!kDecodesBetween) unpack_blocks(chunk, later, blocks, unpacked);
      for (int64_t tile = 0; tile < task.num_tokens; tile += kTokensPerTile) {
        const int64_t tokens_left = task.num_tokens - tile;
        const int64_t tokens = tokens_left < kTokensPerTile ? tokens_left : kTokensPerTile;
        const uint32_t* tile_x = x + tile * row_elements + block * kElementsPerBlock * tokens;
        const uint32_t* x_ahead = tile_x + kPrefetchElements;
        if (s + 1 == task.num_strips) {
          x_ahead = left > blocks ? tile_x + blocks * kElementsPerBlock * tokens
                                  : next_x + tile * row_elements;
        }
        const int64_t parts = (tokens + kRegisterTokens - 1) / kRegisterTokens;
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t begin = tokens * part / parts;
          const int64_t width = tokens * (part + 1) / parts - begin;
          const bool decodes = kDecodesBetween && tile + begin == 0;
          const MultiplyTokens multiply = decodes ? multiply_tokens_for<Source::kPackedKept>(width)
                                                  : multiply_tokens_for<Source::kUnpacked>(width);
          const uint8_t* ahead =
              decodes ? later : reinterpret_cast<const uint8_t*>(x_ahead + begin);
          multiply(chunk, ahead, unpacked, blocks, tile_x + begin, tokens,
                   sums + (tile + begin) * kStripRows);
        }
      }
    }
  }
}

void matmul(const MatmulTask& task) {
  __builtin_memset(task.sums, 0, sizeof(float) * task.num_strips * task.num_tokens * kStripRows);
  if (task.num_tokens > kRegisterTokens) {
    multiply_many_tokens(task);
    return;
  }
  const MultiplyTokens multiply = multiply_tokens_for<Source::kPacked>(task.num_tokens);
  const int64_t ahead_bytes = task.num_tokens <= kStreamTokens ? kStreamAheadBytes : kAheadBytes;
  for (int64_t s = 0; s < task.num_strips; ++s) {
    const uint8_t* strip = task.strips + s * task.num_blocks * kStripBlockBytes;
    multiply(strip, strip + ahead_bytes, reinterpret_cast<Weight*>(task.scratch), task.num_blocks,
             static_cast<const uint32_t*>(task.activations), task.num_tokens,
             task.sums + s * task.num_tokens * kStripRows);
  }
}
