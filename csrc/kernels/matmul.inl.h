// The matrix product over packed strips, shared by all instruction sets. Included inside an
// anonymous namespace, after the instruction set's primitives:
//
//   Sum          accumulator: kRowsPerVector rows x fp32
//   Weight       what one step multiplies: kRowsPerVector rows x one element's columns
//   Line         kRowsPerVector rows of a 64-byte line of nibbles
//   kStepsPerLine            elements per line: 4 (bf16 pairs) or 8 (fp32)
//   kRegisterTokens          most tokens held in accumulators at once
//   vectors_at_once(tokens)  row vectors held in accumulators beside that many tokens
//   load_line, decode<step>, multiply_add, scale_add, zero, load, store
//
// A register tile is `M` tokens x `V` row vectors of a strip. Its weights come packed (one tile of
// tokens: nothing to reuse, decode on the fly at the speed of memory) or unpacked from scratch
// (several tiles: decode once, use often). Both give the same bits.

constexpr int kVectorsPerStrip = kStripRows / kRowsPerVector;
constexpr int kVectorsPerPanel = kPanelRows / kRowsPerVector;
constexpr int kElementsPerGroup = kLinesPerGroup * kStepsPerLine;
constexpr int kElementsPerBlock = kGroupsPerBlock * kElementsPerGroup;

// How far ahead of its use a weight line is asked into L2. 4.6 KB reaches the read roof of a 2-core
// Zen 4 (prototype of this panel, 2026-11); into L1 instead lost a third there.
constexpr int kPrefetchBytes = 4 * kStripBlockBytes;

constexpr int nibble_offset(int vector) {
  return vector / kVectorsPerPanel * kPanelBytes + vector % kVectorsPerPanel * kRowsPerVector * 4;
}

constexpr int scale_offset(int vector, int group) {
  return vector / kVectorsPerPanel * kPanelBytes + kPanelNibbleBytes + group * kPanelRows * 2 +
         vector % kVectorsPerPanel * kRowsPerVector * 2;
}

// One line of a group: acc[i][v] += sum over the line's columns, in ascending order.
template <int M, int V>
struct PackedGroup {
  const uint8_t* strip_block;
  int first_vector;
  int group;

  template <int Step>
  static void step(const Line (&line)[V], const uint32_t* x, int64_t x_stride, Sum (&acc)[M][V]) {
    Weight weight[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) weight[v] = decode<Step>(line[v]);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Element element = broadcast(x + Step * x_stride + i);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[i][v] = multiply_add(weight[v], element, acc[i][v]);
    }
  }

  void accumulate_line(int q, const uint32_t* x, int64_t x_stride, Sum (&acc)[M][V]) const {
    Line line[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      line[v] = load_line(strip_block + nibble_offset(first_vector + v) +
                          (group * kLinesPerGroup + q) * kLineBytes);
    }
    step<0>(line, x, x_stride, acc);
    step<1>(line, x, x_stride, acc);
    step<2>(line, x, x_stride, acc);
    step<3>(line, x, x_stride, acc);
    if constexpr (kStepsPerLine == 8) {
      step<4>(line, x, x_stride, acc);
      step<5>(line, x, x_stride, acc);
      step<6>(line, x, x_stride, acc);
      step<7>(line, x, x_stride, acc);
    }
  }
};

// The same from weights that unpack_block() has decoded: [group][element][vector of the strip].
template <int M, int V>
struct UnpackedGroup {
  const Weight* weights;
  int first_vector;
  int group;

  void accumulate(const uint32_t* x, int64_t x_stride, Sum (&acc)[M][V]) const {
    const Weight* w = weights + group * kElementsPerGroup * kVectorsPerStrip + first_vector;
    for (int e = 0; e < kElementsPerGroup; ++e) {
      Weight weight[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) weight[v] = w[e * kVectorsPerStrip + v];
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const Element element = broadcast(x + e * x_stride + i);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[i][v] = multiply_add(weight[v], element, acc[i][v]);
      }
    }
  }
};

// Adds blocks [0, num_blocks) of one register tile to sums (row i at sums + i * kStripRows).
// x: element e of token i at [e * x_stride + i]. unpacked: null, or num_blocks decoded blocks.
template <int M, int V, bool kUnpacked>
void multiply_register_tile(const uint8_t* strip, const Weight* unpacked, int64_t num_blocks,
                            int first_vector, const uint32_t* x, int64_t x_stride, float* sums) {
  // Each accumulator is one chain of dependent multiplications. Few tokens make few chains, too few
  // to hide their latency: then the block's two groups run side by side.
  constexpr int kGroups = !kUnpacked && 2 * M * V <= kRegisterTokens ? 2 : 1;
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
    if constexpr (!kUnpacked) {
      const uint8_t* ahead = strip_block + nibble_offset(first_vector) + kPrefetchBytes;
      constexpr int kLines = kStripBlockBytes * V / kVectorsPerStrip / kLineBytes;
#pragma GCC unroll 18
      for (int line = 0; line < kLines; ++line) __builtin_prefetch(ahead + line * kLineBytes, 0, 2);
    }
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
      // Lines and elements are not unrolled: with twelve tokens the code would outgrow the micro-op
      // cache (a tenth slower on Zen 4, 2026-11).
      if constexpr (kUnpacked) {
        const Weight* weights = unpacked + block * kElementsPerBlock * kVectorsPerStrip;
        UnpackedGroup<M, V>{weights, first_vector, group}.accumulate(xg, x_stride, acc[0]);
      } else {
        for (int q = 0; q < kLinesPerGroup; ++q) {
#pragma GCC unroll 2
          for (int g = 0; g < kGroups; ++g) {
            const uint32_t* xq = xg + (g * kLinesPerGroup + q) * kStepsPerLine * x_stride;
            PackedGroup<M, V>{strip_block, first_vector, group + g}.accumulate_line(q, xq, x_stride,
                                                                                    acc[g]);
          }
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
template <int M, bool kUnpacked>
void multiply_tokens(const uint8_t* strip, const Weight* unpacked, int64_t num_blocks,
                     const uint32_t* x, int64_t x_stride, float* sums) {
  constexpr int V = vectors_at_once(M);
  static_assert(kVectorsPerStrip % V == 0);
  for (int first_vector = 0; first_vector < kVectorsPerStrip; first_vector += V) {
    multiply_register_tile<M, V, kUnpacked>(strip, unpacked, num_blocks, first_vector, x, x_stride,
                                            sums);
  }
}

using MultiplyTokens = void (*)(const uint8_t*, const Weight*, int64_t, const uint32_t*, int64_t,
                                float*);

template <bool kUnpacked>
MultiplyTokens multiply_tokens_for(int64_t tokens) {
  switch (tokens) {
    case 1:
      return multiply_tokens<1, kUnpacked>;
    case 2:
      return multiply_tokens<2, kUnpacked>;
    case 3:
      return multiply_tokens<3, kUnpacked>;
    case 4:
      return multiply_tokens<4, kUnpacked>;
    case 5:
      return multiply_tokens<5, kUnpacked>;
    default:
      break;
  }
  if constexpr (kRegisterTokens > 6) {
    switch (tokens) {
      case 7:
        return multiply_tokens<7, kUnpacked>;
      case 8:
        return multiply_tokens<8, kUnpacked>;
      case 9:
        return multiply_tokens<9, kUnpacked>;
      case 10:
        return multiply_tokens<10, kUnpacked>;
      case 11:
        return multiply_tokens<11, kUnpacked>;
      case 12:
        return multiply_tokens<12, kUnpacked>;
      default:
        break;
    }
  }
  return multiply_tokens<6, kUnpacked>;
}

// One tile of `tokens` tokens, in as many register tiles as it takes, of nearly equal width.
template <bool kUnpacked>
void multiply_tile(const uint8_t* strip, const Weight* unpacked, int64_t num_blocks,
                   const uint32_t* x, int64_t tokens, float* sums) {
  const int64_t parts = (tokens + kRegisterTokens - 1) / kRegisterTokens;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = tokens * part / parts;
    const int64_t width = tokens * (part + 1) / parts - begin;
    multiply_tokens_for<kUnpacked>(width)(strip, unpacked, num_blocks, x + begin, tokens,
                                          sums + begin * kStripRows);
  }
}

template <int Step>
void unpack_step(const Line (&line)[kVectorsPerStrip], Weight* out) {
#pragma GCC unroll 16
  for (int v = 0; v < kVectorsPerStrip; ++v)
    out[Step * kVectorsPerStrip + v] = decode<Step>(line[v]);
}

void unpack_block(const uint8_t* strip_block, Weight* out) {
  for (int row_line = 0; row_line < kGroupsPerBlock * kLinesPerGroup; ++row_line) {
    Line line[kVectorsPerStrip];
#pragma GCC unroll 16
    for (int v = 0; v < kVectorsPerStrip; ++v) {
      line[v] = load_line(strip_block + nibble_offset(v) + row_line * kLineBytes);
      __builtin_prefetch(strip_block + nibble_offset(v) + row_line * kLineBytes + kPrefetchBytes, 0,
                         2);
    }
    unpack_step<0>(line, out);
    unpack_step<1>(line, out);
    unpack_step<2>(line, out);
    unpack_step<3>(line, out);
    if constexpr (kStepsPerLine == 8) {
      unpack_step<4>(line, out);
      unpack_step<5>(line, out);
      unpack_step<6>(line, out);
      unpack_step<7>(line, out);
    }
    out += kStepsPerLine * kVectorsPerStrip;
  }
}

constexpr int kUnpackedBlockBytes =
    kElementsPerBlock * kVectorsPerStrip * static_cast<int>(sizeof(Weight));
constexpr int kBlocksPerChunk = kScratchBytes / kUnpackedBlockBytes;
static_assert(kBlocksPerChunk >= 1);

// Several tiles: for each chunk of columns, every strip is decoded once and meets every tile while
// the chunk of activations stays in L2.
void multiply_many_tiles(const MatmulTask& task) {
  const uint32_t* x = static_cast<const uint32_t*>(task.activations);
  Weight* unpacked = reinterpret_cast<Weight*>(task.scratch);
  const int64_t row_elements = task.num_blocks * kElementsPerBlock;
  for (int64_t block = 0; block < task.num_blocks; block += kBlocksPerChunk) {
    const int64_t left = task.num_blocks - block;
    const int64_t blocks = left < kBlocksPerChunk ? left : kBlocksPerChunk;
    for (int64_t s = 0; s < task.num_strips; ++s) {
      const uint8_t* chunk = task.strips + (s * task.num_blocks + block) * kStripBlockBytes;
      for (int64_t b = 0; b < blocks; ++b) {
        unpack_block(chunk + b * kStripBlockBytes,
                     unpacked + b * kElementsPerBlock * kVectorsPerStrip);
      }
      for (int64_t begin = 0; begin < task.num_tokens; begin += kTokensPerTile) {
        const int64_t tokens_left = task.num_tokens - begin;
        const int64_t tokens = tokens_left < kTokensPerTile ? tokens_left : kTokensPerTile;
        multiply_tile<true>(chunk, unpacked, blocks,
                            x + begin * row_elements + block * kElementsPerBlock * tokens, tokens,
                            task.sums + (s * task.num_tokens + begin) * kStripRows);
      }
    }
  }
}

void matmul(const MatmulTask& task) {
  __builtin_memset(task.sums, 0, sizeof(float) * task.num_strips * task.num_tokens * kStripRows);
  if (task.num_tokens > kTokensPerTile) {
    multiply_many_tiles(task);
    return;
  }
  for (int64_t s = 0; s < task.num_strips; ++s) {
    multiply_tile<false>(task.strips + s * task.num_blocks * kStripBlockBytes, nullptr,
                         task.num_blocks, static_cast<const uint32_t*>(task.activations),
                         task.num_tokens, task.sums + s * task.num_tokens * kStripRows);
  }
}
