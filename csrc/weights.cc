#include "weights.h"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace hybridk2 {
namespace {

int64_t multiply_or_throw(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) {
      throw std::invalid_argument("the experts' weights exceed 2^63 bytes");
    }
  }
  return product;
}

const ExpertsShape& checked(const ExpertsShape& shape) {
  const auto require = [](bool holds, const char* name, const char* rule, int64_t found) {
    if (holds) return;
    throw std::invalid_argument(std::string(name) + ": expected " + rule + ", found " +
                                std::to_string(found));
  };
  constexpr int64_t kMost = int64_t{1} << 24;
  const auto positive = [&](const char* name, int64_t value) {
    require(value >= 1 && value <= kMost, name, "1 to 16777216", value);
  };
  positive("num_layers", shape.num_layers);
  positive("num_experts", shape.num_experts);
  positive("hidden", shape.hidden);
  positive("intermediate", shape.intermediate);
  require(shape.hidden % kGroupColumns == 0, "hidden", "a multiple of 32", shape.hidden);
  require(shape.intermediate % kGroupColumns == 0, "intermediate", "a multiple of 32",
          shape.intermediate);
  return shape;
}

int64_t gate_up_strip_bytes(const ExpertsShape& shape) {
  return blocks_of(shape.hidden) * kStripBlockBytes;
}

int64_t down_strip_bytes(const ExpertsShape& shape) {
  return blocks_of(shape.intermediate) * kStripBlockBytes;
}

// Cuts strips [0, total) in proportion to threads, each cut at the nearest strip.
StripRange share(int64_t total, int64_t threads_before, int64_t threads, int64_t all_threads) {
  const auto cut = [&](int64_t at) { return (total * at + all_threads / 2) / all_threads; };
  const int64_t first = cut(threads_before);
  return {first, cut(threads_before + threads) - first};
}

// Numbers those that are here, in order; -1: elsewhere.
std::vector<int64_t> places(const ExpertsShape& shape, const std::vector<bool>& elsewhere) {
  if (elsewhere.empty()) return {};
  const int64_t experts = multiply_or_throw({shape.num_layers, shape.num_experts});
  if (static_cast<int64_t>(elsewhere.size()) != experts) {
    throw std::invalid_argument("elsewhere: expected " + std::to_string(experts) +
                                " values, found " + std::to_string(elsewhere.size()));
  }
  std::vector<int64_t> places;
  int64_t next = 0;
  for (const bool is_elsewhere : elsewhere) places.push_back(is_elsewhere ? -1 : next++);
  return places;
}

}  // namespace

int64_t expert_bytes(const ExpertsShape& shape) {
  return strips_of_gate_up(shape) * gate_up_strip_bytes(shape) +
         strips_of_down(shape) * down_strip_bytes(shape);
}

void pack_expert(const ExpertsShape& shape, const ExpertMatrices& matrices, uint8_t* out) {
  pack_strips({matrices.gate, 0, kPanelRows}, {matrices.up, 0, kPanelRows},
              strips_of_gate_up(shape), shape.hidden, out);
  pack_strips({matrices.down, 0, kStripRows}, {matrices.down, kPanelRows, kStripRows},
              strips_of_down(shape), shape.intermediate,
              out + strips_of_gate_up(shape) * gate_up_strip_bytes(shape));
}

Weights::Weights(const ExpertsShape& shape, const ThreadPlan& plan, bool huge_pages,
                 const std::vector<bool>& elsewhere)
    : shape_(checked(shape)), places_(places(shape, elsewhere)) {
  const int64_t held = multiply_or_throw({shape.num_layers, shape.num_experts}) -
                       std::count(elsewhere.begin(), elsewhere.end(), true);
  const int64_t all_threads = static_cast<int64_t>(plan.workers.size());
  int64_t threads_before = 0;
  for (size_t node = 0; node < plan.nodes.size(); ++node) {
    const int64_t threads = plan.threads_of_node[node];
    ExpertSlice slice;
    slice.gate_up = share(strips_of_gate_up(shape), threads_before, threads, all_threads);
    slice.down = share(strips_of_down(shape), threads_before, threads, all_threads);
    slice.gate_up_bytes = slice.gate_up.count * gate_up_strip_bytes(shape);
    slice.bytes = slice.gate_up_bytes + slice.down.count * down_strip_bytes(shape);
    slices_.push_back(slice);
    threads_before += threads;
  }
  for (size_t node = 0; node < plan.nodes.size(); ++node) {
    arenas_.push_back(std::make_unique<Arena>("the routed experts' weights",
                                              multiply_or_throw({held, slices_[node].bytes}),
                                              huge_pages, plan.nodes[node].number));
  }
}

int64_t Weights::bytes() const {
  int64_t bytes = 0;
  for (const std::unique_ptr<Arena>& arena : arenas_) bytes += static_cast<int64_t>(arena->bytes());
  return bytes;
}

uint8_t* Weights::gate_up(int node, int64_t layer, int64_t expert) const {
  return arenas_[node]->data() + place(layer, expert) * slices_[node].bytes;
}

uint8_t* Weights::down(int node, int64_t layer, int64_t expert) const {
  return gate_up(node, layer, expert) + slices_[node].gate_up_bytes;
}

void Weights::pack(int node, int64_t layer, int64_t expert, const ExpertMatrices& matrices,
                   int64_t begin, int64_t end) const {
  const ExpertSlice& slice = slices_[node];
  if (const int64_t count = std::min(end, slice.gate_up.count) - begin; count > 0) {
    const int64_t row = (slice.gate_up.first + begin) * kPanelRows;
    pack_strips({matrices.gate, row, kPanelRows}, {matrices.up, row, kPanelRows}, count,
                shape_.hidden, gate_up(node, layer, expert) + begin * gate_up_strip_bytes(shape_));
  }
  const int64_t first = std::max<int64_t>(begin - slice.gate_up.count, 0);
  if (const int64_t count = end - slice.gate_up.count - first; count > 0) {
    const int64_t row = (slice.down.first + first) * kStripRows;
    pack_strips({matrices.down, row, kStripRows}, {matrices.down, row + kPanelRows, kStripRows},
                count, shape_.intermediate,
                down(node, layer, expert) + first * down_strip_bytes(shape_));
  }
}

std::vector<ExpertRegion> Weights::regions(int64_t layer, int64_t expert) const {
  const int64_t down_begin = strips_of_gate_up(shape_) * gate_up_strip_bytes(shape_);
  std::vector<ExpertRegion> found;
  const auto add = [&](const uint8_t* begin, int64_t bytes, int64_t offset) {
    if (bytes == 0) return;
    if (!found.empty() && found.back().begin + found.back().bytes == begin &&
        found.back().offset + found.back().bytes == offset) {
      found.back().bytes += bytes;
    } else {
      found.push_back({begin, bytes, offset});
    }
  };
  for (int node = 0; node < nodes(); ++node) {
    const ExpertSlice& slice = slices_[node];
    add(gate_up(node, layer, expert), slice.gate_up_bytes,
        slice.gate_up.first * gate_up_strip_bytes(shape_));
  }
  for (int node = 0; node < nodes(); ++node) {
    const ExpertSlice& slice = slices_[node];
    add(down(node, layer, expert), slice.bytes - slice.gate_up_bytes,
        down_begin + slice.down.first * down_strip_bytes(shape_));
  }
  return found;
}

void Weights::unpack(int64_t layer, int64_t expert, float* gate, float* up, float* down_out) const {
  for (int node = 0; node < nodes(); ++node) {
    const ExpertSlice& slice = slices_[node];
    const int64_t gate_row = slice.gate_up.first * kPanelRows;
    const int64_t down_row = slice.down.first * kStripRows;
    const uint8_t* strips = gate_up(node, layer, expert);
    unpack_strips(strips, 0, slice.gate_up.count, shape_.hidden, {gate, gate_row, kPanelRows});
    unpack_strips(strips, 1, slice.gate_up.count, shape_.hidden, {up, gate_row, kPanelRows});
    for (int panel = 0; panel < 2; ++panel) {
      unpack_strips(down(node, layer, expert), panel, slice.down.count, shape_.intermediate,
                    {down_out, down_row + panel * kPanelRows, kStripRows});
    }
  }
}

}  // namespace hybridk2
