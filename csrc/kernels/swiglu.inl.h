// silu(gate) * up of one strip, written as activations for the next matrix product. Included inside
// an anonymous namespace after matmul.inl.h or amx.inl.h; also needs kColumnsPerElement.

using Bits = int32_t __attribute__((vector_size(sizeof(Sum))));

Sum splat(float value) { return zero() + value; }

// e^x for every x; infinity from 88.8 up, 0 from -104 down, NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, so that n * kLn2High is exact. The
// polynomial is Cephes' expf (relative error 2e-8 on that interval); with its roundings the whole
// stays below 2.5 ulp. 2^n is applied as two factors: n reaches beyond the exponents of fp32 on
// both sides.
Sum exponential(Sum x) {
  constexpr float kLimit = 104.0f;
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23: its last bit is worth 1
  x = x > splat(kLimit) ? splat(kLimit) : x;
  x = x < splat(-kLimit) ? splat(-kLimit) : x;
  const Sum shifted = x * kLog2E + kRoundToInteger;
  const Sum n = shifted - kRoundToInteger;
  const Bits exponent = (Bits)shifted - (Bits)splat(kRoundToInteger);
  const Sum r = (x - n * kLn2High) - n * kLn2Low;
  Sum p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Bits half = exponent >> 1;
  const Sum first = (Sum)((half + 127) << 23);
  const Sum second = (Sum)((exponent - half + 127) << 23);
  return p * first * second;
}

// To the nearest bf16, ties to even, as an fp32; NaN stays NaN.
Sum round_to_bf16(Sum x) {
  const Bits bits = (Bits)x;
  const Bits nearest = bits + 0x7fff + ((bits >> 16) & 1);
  const Bits quiet = bits | 0x00400000;
  return (Sum)((x == x ? nearest : quiet) & (int32_t)0xffff0000);
}

template <int64_t kTokensPerOutputTile = kTokensPerTile>
void swiglu(const SwigluTask& task) {
  const int64_t row_elements = task.num_columns / kColumnsPerElement;
  uint32_t* out = static_cast<uint32_t*>(task.activations);
  for (int64_t begin = 0; begin < task.num_tokens; begin += kTokensPerOutputTile) {
    const int64_t left = task.num_tokens - begin;
    const int64_t tokens = left < kTokensPerOutputTile ? left : kTokensPerOutputTile;
    uint32_t* tile = out + begin * row_elements + task.first_column / kColumnsPerElement * tokens;
    for (int64_t i = 0; i < tokens; ++i) {
      const float* sums = task.sums + (begin + i) * kStripRows;
      alignas(64) uint32_t row[kPanelRows];
      for (int v = 0; v < kVectorsPerPanel; ++v) {
        const Sum gate = load(sums + v * kRowsPerVector);
        const Sum up = load(sums + kPanelRows + v * kRowsPerVector);
        const Sum product = gate / (exponential(-gate) + 1.0f) * up;
        const Sum result = task.round_to_bf16 ? round_to_bf16(product) : product;
        __builtin_memcpy(row + v * kRowsPerVector, &result, sizeof(result));
      }
      for (int e = 0; e < kPanelRows / kColumnsPerElement; ++e) {
        tile[e * tokens + i] =
            kColumnsPerElement == 1
                ? row[e]
                : row[e * kColumnsPerElement] >> 16 |
                      (row[e * kColumnsPerElement + kColumnsPerElement - 1] & 0xffff0000u);
      }
    }
  }
}
