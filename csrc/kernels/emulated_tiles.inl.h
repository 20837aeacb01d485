// The portable twin of the AMX tile registers: plain arrays that compute what Intel's manual (SDM,
// volume 2, TDPBF16PS) says, bit for bit, on any CPU. Included inside an anonymous namespace, after
// <cassert>. What a real tile would refuse with #UD is an assertion here.

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

// Smallest normal fp32. All smaller inputs count as zero and smaller results become zero, with
// their sign, whatever MXCSR says.
float flush(float value) {
  constexpr float kSmallestNormal = 1.17549435e-38f;
  const float magnitude = __builtin_fabsf(value);
  return magnitude < kSmallestNormal ? __builtin_copysignf(0.0f, value) : value;
}

float widen_flushed(uint32_t bf16) {
  const uint32_t bits = bf16 << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return flush(value);
}

// a * b + c in one rounding, for a and b from bf16. The product's 16 bits are exact in fp64.
// Rounding the sum to fp64 first does no harm: unless it is exact there, a * b and c lie so far
// apart that neither the sum nor its fp64 can be half-way between two fp32.
float fused_multiply_add(float a, float b, float c) {
  return flush(static_cast<float>(static_cast<double>(a) * b + c));
}

class Tiles {
 public:
  struct Rows {
    uint8_t of_tile[8];  // 0: the tile is not used
  };

  explicit Tiles(const Rows& rows) : rows_(rows) {
    for (const uint8_t count : rows.of_tile) assert(count <= kTileRows);
  }

  template <int kTile>
  void load(const void* rows, int64_t stride_bytes) {
    zero<kTile>();
    for (int row = 0; row < rows_.of_tile[kTile]; ++row) {
      __builtin_memcpy(tiles_[kTile][row], static_cast<const uint8_t*>(rows) + row * stride_bytes,
                       kTileRowBytes);
    }
  }
  template <int kTile>
  void store(void* rows, int64_t stride_bytes) {
    assert(rows_.of_tile[kTile] > 0);
    for (int row = 0; row < rows_.of_tile[kTile]; ++row) {
      __builtin_memcpy(static_cast<uint8_t*>(rows) + row * stride_bytes, tiles_[kTile][row],
                       kTileRowBytes);
    }
  }
  template <int kTile>
  void zero() {
    assert(rows_.of_tile[kTile] > 0);
    __builtin_memset(tiles_[kTile], 0, sizeof(tiles_[kTile]));
  }
  // kY (tokens x rows) += kX (tokens x column pairs) * kWeights (column pairs x rows). Even and odd
  // columns are summed apart from zero, then added, then added to what the tile holds.
  template <int kY, int kX, int kWeights>
  void multiply_add() {
    static_assert(kY != kX && kX != kWeights && kY != kWeights);
    assert(rows_.of_tile[kY] == rows_.of_tile[kX] && rows_.of_tile[kWeights] == kTileRows);
    float even_weights[kTileRows][kLanes], odd_weights[kTileRows][kLanes];
    for (int k = 0; k < kTileRows; ++k) {
      for (int n = 0; n < kLanes; ++n) {
        even_weights[k][n] = widen_flushed(tiles_[kWeights][k][n] & 0xffff);
        odd_weights[k][n] = widen_flushed(tiles_[kWeights][k][n] >> 16);
      }
    }
    for (int m = 0; m < rows_.of_tile[kY]; ++m) {
      float even[kLanes] = {}, odd[kLanes] = {}, y[kLanes];
      for (int k = 0; k < kTileRows; ++k) {
        const float x_even = widen_flushed(tiles_[kX][m][k] & 0xffff);
        const float x_odd = widen_flushed(tiles_[kX][m][k] >> 16);
        for (int n = 0; n < kLanes; ++n) {
          even[n] = fused_multiply_add(x_even, even_weights[k][n], even[n]);
          odd[n] = fused_multiply_add(x_odd, odd_weights[k][n], odd[n]);
        }
      }
      __builtin_memcpy(y, tiles_[kY][m], sizeof(y));
      for (int n = 0; n < kLanes; ++n) y[n] = flush(flush(y[n]) + flush(even[n] + odd[n]));
      __builtin_memcpy(tiles_[kY][m], y, sizeof(y));
    }
  }

 private:
  static constexpr int kLanes = kTileRowBytes / 4;

  Rows rows_;
  uint32_t tiles_[8][kTileRows][kLanes] = {};
};
