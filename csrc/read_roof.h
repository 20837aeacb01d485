// Plain loops that read memory as fast as they can: the roof that decoding is measured against.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridk2 {

// Ways of reading; which is fastest depends on the machine, so a bench takes the best.
constexpr int kNumReadLoops = 4;
const char* read_loop_name(int loop);

// Reads `bytes` (a multiple of 4096) at `data` and returns something that depends on all of it.
uint64_t read_all(int loop, const uint8_t* data, size_t bytes);

}  // namespace hybridk2
