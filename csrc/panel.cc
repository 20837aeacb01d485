#include "panel.h"

#include <cstring>
#include <initializer_list>

namespace hybridk2 {
namespace {

constexpr uint32_t kZeros = 0x88888888;  // eight nibbles of value 0

// Even columns into the low half, odd ones into the high half, each in order.
inline uint32_t split_even_odd(uint32_t word) {
  uint32_t even = word & 0x0f0f0f0f;
  uint32_t odd = word >> 4 & 0x0f0f0f0f;
  even = (even | even >> 4) & 0x00ff00ff;
  odd = (odd | odd >> 4) & 0x00ff00ff;
  even = (even | even >> 8) & 0x0000ffff;
  odd = odd | odd >> 8;
  return even | odd << 16;
}

// One panel whose rows begin at words and scales, `columns` columns from here to the row's end.
void pack_panel(const uint32_t* words, int64_t row_words, const uint16_t* scales,
                int64_t row_scales, int64_t columns, uint8_t* panel) {
  constexpr int kWords = kBlockColumns / 8;
  const int valid_words = columns >= kBlockColumns ? kWords : static_cast<int>(columns / 8);
  uint32_t lanes[kWords][kPanelRows];
  for (int row = 0; row < kPanelRows; ++row) {
    for (int j = 0; j < valid_words; ++j) lanes[j][row] = words[row * row_words + j];
    for (int j = valid_words; j < kWords; ++j) lanes[j][row] = kZeros;
  }
  for (int j = 0; j < kWords; ++j) {
    for (int row = 0; row < kPanelRows; ++row) lanes[j][row] = split_even_odd(lanes[j][row]);
  }
  std::memcpy(panel, lanes, sizeof(lanes));
  uint16_t group_scales[kGroupsPerBlock][kPanelRows];
  for (int group = 0; group < kGroupsPerBlock; ++group) {
    const bool valid = group * kGroupColumns < columns;
    for (int row = 0; row < kPanelRows; ++row) {
      group_scales[group][row] = valid ? scales[row * row_scales + group] : uint16_t{0};
    }
  }
  std::memcpy(panel + kPanelNibbleBytes, group_scales, sizeof(group_scales));
}

float widen(uint16_t bf16) {
  const uint32_t bits = uint32_t{bf16} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

void pack_strips(const StripSource& first, const StripSource& second, int64_t num_strips,
                 int64_t columns, uint8_t* strips) {
  const int64_t row_words = columns / 8;
  const int64_t row_scales = columns / kGroupColumns;
  for (int64_t s = 0; s < num_strips; ++s) {
    for (int64_t block = 0; block < blocks_of(columns); ++block) {
      for (const StripSource* source : {&first, &second}) {
        const int64_t row = source->first_row + s * source->row_step;
        pack_panel(source->matrix.words + row * row_words + block * kBlockColumns / 8, row_words,
                   source->matrix.scales + row * row_scales + block * kGroupsPerBlock, row_scales,
                   columns - block * kBlockColumns, strips);
        strips += kPanelBytes;
      }
    }
  }
}

void unpack_strips(const uint8_t* strips, int panel, int64_t num_strips, int64_t columns,
                   const StripTarget& target) {
  for (int64_t s = 0; s < num_strips; ++s) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t block = s * blocks_of(columns) + column / kBlockColumns;
      const uint8_t* begin = strips + block * kStripBlockBytes + panel * kPanelBytes;
      const int in_block = static_cast<int>(column % kBlockColumns);
      const int line = in_block / kLineColumns;
      const int shift = 4 * (in_block % kLineColumns / 2) + 16 * (in_block % 2);
      for (int row = 0; row < kPanelRows; ++row) {
        uint32_t lane;
        uint16_t scale;
        std::memcpy(&lane, begin + line * kLineBytes + row * sizeof(lane), sizeof(lane));
        const int group = in_block / kGroupColumns;
        std::memcpy(&scale, begin + kPanelNibbleBytes + (group * kPanelRows + row) * sizeof(scale),
                    sizeof(scale));
        const int value = static_cast<int>(lane >> shift & 15) - 8;
        target.matrix[(target.first_row + s * target.row_step + row) * columns + column] =
            static_cast<float>(value) * widen(scale);
      }
    }
  }
}

}  // namespace hybridk2
