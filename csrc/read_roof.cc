#include "read_roof.h"

#include <emmintrin.h>

namespace hybridk2 {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kStep = 4 * kLine;

// kAhead bytes of software prefetch, 0 for none; kHint as of _mm_prefetch. Streams: the range is
// read as this many interleaved streams.
template <size_t kAhead, _mm_hint kHint, size_t kStreams>
uint64_t read(const uint8_t* data, size_t bytes) {
  __m128i sums[8] = {};
  const size_t stream_bytes = bytes / kStreams;
  for (size_t offset = 0; offset < stream_bytes; offset += kStep) {
    for (size_t stream = 0; stream < kStreams; ++stream) {
      const uint8_t* begin = data + stream * stream_bytes + offset;
#pragma GCC unroll 4
      for (size_t line = 0; line < kStep; line += kLine) {
        if constexpr (kAhead > 0) _mm_prefetch(begin + line + kAhead, kHint);
#pragma GCC unroll 4
        for (size_t part = 0; part < 4; ++part) {
          const __m128i* from = reinterpret_cast<const __m128i*>(begin + line) + part;
          __m128i& sum = sums[(line / kLine * 4 + part) % 8];
          sum = _mm_xor_si128(sum, _mm_load_si128(from));
        }
      }
    }
  }
  for (int i = 1; i < 8; ++i) sums[0] = _mm_xor_si128(sums[0], sums[i]);
  alignas(16) uint64_t halves[2];
  _mm_store_si128(reinterpret_cast<__m128i*>(halves), sums[0]);
  return halves[0] ^ halves[1];
}

struct ReadLoop {
  const char* name;
  uint64_t (*read)(const uint8_t*, size_t);
};

constexpr ReadLoop kReadLoops[kNumReadLoops] = {
    {"plain", read<0, _MM_HINT_T0, 1>},
    {"prefetch to L1, 4 KB ahead", read<4096, _MM_HINT_T0, 1>},
    {"prefetch to L2, 4 KB ahead", read<4096, _MM_HINT_T1, 1>},
    {"four streams", read<0, _MM_HINT_T0, 4>},
};

}  // namespace

const char* read_loop_name(int loop) { return kReadLoops[loop].name; }

uint64_t read_all(int loop, const uint8_t* data, size_t bytes) {
  return kReadLoops[loop].read(data, bytes);
}

}  // namespace hybridk2
