// The AMX loops on the portable twin of the tiles, for any x86-64: gives amx's bits, slowly. It
// exists for tests, of the loops here and of real tiles where there are some; dispatch.cc runs it
// only when it is asked for by name.
#include <cassert>

#include "kernels.h"

namespace hybridk2 {
namespace {

#include "emulated_tiles.inl.h"

constexpr int kRowsPerVector = 4;

using Sum = float __attribute__((vector_size(16)));
using Weight = uint32_t __attribute__((vector_size(16)));  // 8 x bf16
using Line = Weight;
using Elements = uint32_t __attribute__((vector_size(16)));  // four elements of one token

Sum zero() { return Sum{}; }

Sum load(const float* p) {
  Sum value;
  __builtin_memcpy(&value, p, sizeof(value));
  return value;
}

void store(float* p, Sum value) { __builtin_memcpy(p, &value, sizeof(value)); }

Line load_line(const uint8_t* p) {
  Line line;
  __builtin_memcpy(&line, p, sizeof(line));
  return line;
}

void store_weight(uint8_t* p, Weight weight) { __builtin_memcpy(p, &weight, sizeof(weight)); }

constexpr uint32_t kValues[16] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                  0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

// The value whose nibble begins at bit `High` of each lane above the one whose begins at `Low`.
template <int Low, int High>
Weight decode_pair(Line line) {
  Weight weight;
  for (int r = 0; r < kRowsPerVector; ++r) {
    weight[r] = kValues[line[r] >> Low & 15] | kValues[line[r] >> High & 15] << 16;
  }
  return weight;
}

template <int Step>
Weight decode(Line line) {
  return decode_pair<4 * Step, 16 + 4 * Step>(line);
}

template <int Half>
Weight even_weights(Line line) {
  return decode_pair<8 * Half + 4, 8 * Half>(line);
}

template <int Half>
Weight odd_weights(Line line) {
  return decode_pair<16 + 8 * Half + 4, 16 + 8 * Half>(line);
}

Elements load_elements(const uint32_t* x) {
  Elements elements;
  __builtin_memcpy(&elements, x, sizeof(elements));
  return elements;
}

template <int Half>
uint32_t even_columns(Elements x) {
  return x[2 * Half] << 16 | (x[2 * Half + 1] & 0xffffu);
}

template <int Half>
uint32_t odd_columns(Elements x) {
  return (x[2 * Half] & 0xffff0000u) | x[2 * Half + 1] >> 16;
}

Sum multiply_add(Weight weight, uint32_t columns, Sum sum) {
  const float x_low = widen_flushed(columns & 0xffff), x_high = widen_flushed(columns >> 16);
  for (int r = 0; r < kRowsPerVector; ++r) {
    const float high = fused_multiply_add(x_high, widen_flushed(weight[r] >> 16), flush(sum[r]));
    sum[r] = fused_multiply_add(x_low, widen_flushed(weight[r] & 0xffff), high);
  }
  return sum;
}

Sum add_flushed(Sum a, Sum b) {
  const Sum sum = a + b;
  Sum flushed;
  for (int r = 0; r < kRowsPerVector; ++r) flushed[r] = flush(sum[r]) + 0.0f;
  return flushed;
}

Sum load_scale(const uint8_t* p) {
  uint16_t bf16[kRowsPerVector];
  __builtin_memcpy(bf16, p, sizeof(bf16));
  const Line bits = {uint32_t{bf16[0]} << 16, uint32_t{bf16[1]} << 16, uint32_t{bf16[2]} << 16,
                     uint32_t{bf16[3]} << 16};
  return (Sum)bits;
}

Sum scale_add(Sum sum, Sum scale, Sum total) {
  for (int r = 0; r < kRowsPerVector; ++r) total[r] = __builtin_fmaf(sum[r], scale[r], total[r]);
  return total;
}

#include "amx.inl.h"
#include "swiglu.inl.h"

}  // namespace

const ActivationKernels kAmxEmulatedKernels = {kColumnsPerElement, matmul,
                                               swiglu<kTokensPerRowTile>, kTokensPerRowTile};

}  // namespace hybridk2
