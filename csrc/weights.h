// The routed experts' weights: every NUMA node holds a slice of every expert, and its threads alone
// read it. Knows how strips are dealt to nodes and lie in memory, not what is computed with them.
//
// Experts that another place keeps take no memory: those that are here lie without gaps, layer by
// layer, each layer's in ascending order.
//
// A slice is whole strips: of gate and up, which give some columns of the intermediates, and of
// down, which give some rows of the output. No sum is split, so results are the same, bit for bit,
// however many nodes there are, and all that crosses nodes are activations: of a token in K2 14 KB
// of inputs and 4 KB of intermediates for each expert, whose weights are 25 MB. (Splitting down by
// columns instead, where the intermediates lie, would save the 4 KB and cost 28 KB of partial sums
// from each node, added in an order that depends on the nodes.)
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "arena.h"
#include "panel.h"
#include "topology.h"

namespace hybridk2 {

struct ExpertsShape {
  int64_t num_layers;
  int64_t num_experts;
  int64_t hidden;        // multiple of 32
  int64_t intermediate;  // multiple of 32
};

inline int64_t strips_of_gate_up(const ExpertsShape& shape) {
  return shape.intermediate / kPanelRows;
}
inline int64_t strips_of_down(const ExpertsShape& shape) { return shape.hidden / kStripRows; }

struct ExpertMatrices {
  PackedMatrix gate;  // (intermediate, hidden)
  PackedMatrix up;    // (intermediate, hidden)
  PackedMatrix down;  // (hidden, intermediate)
};

// An expert as one node would hold it: all strips of gate and up, then all of down.
int64_t expert_bytes(const ExpertsShape& shape);
void pack_expert(const ExpertsShape& shape, const ExpertMatrices& matrices, uint8_t* out);

// A piece of an expert in memory, and where it begins in the expert as one node would hold it.
struct ExpertRegion {
  const uint8_t* begin;
  int64_t bytes;
  int64_t offset;
};

// Strips [first, first + count) of a matrix.
struct StripRange {
  int64_t first;
  int64_t count;
};

// A node's part of each expert: its strips of gate and up (one for 16 rows of both), then its
// strips of down (32 rows). Empty where there are fewer strips than nodes.
struct ExpertSlice {
  StripRange gate_up;
  StripRange down;
  int64_t gate_up_bytes;
  int64_t bytes;

  int64_t strips() const { return gate_up.count + down.count; }
};

class Weights {
 public:
  // A slice on each of the plan's nodes, in proportion to its threads. elsewhere: for each expert
  // of each layer, whether another place keeps it; empty: none is. Throws std::invalid_argument,
  // OutOfMemoryError.
  Weights(const ExpertsShape& shape, const ThreadPlan& plan, bool huge_pages,
          const std::vector<bool>& elsewhere = {});

  const ExpertsShape& shape() const { return shape_; }
  int nodes() const { return static_cast<int>(slices_.size()); }
  const ExpertSlice& slice(int node) const { return slices_[node]; }
  Arena& arena(int node) const { return *arenas_[node]; }
  int64_t bytes() const;
  bool is_elsewhere(int64_t layer, int64_t expert) const { return place(layer, expert) < 0; }

  // Strips of gate and up of an expert on a node, and those of down. The expert is here.
  uint8_t* gate_up(int node, int64_t layer, int64_t expert) const;
  uint8_t* down(int node, int64_t layer, int64_t expert) const;

  // Repacks strips [begin, end) of an expert's slice, counted over gate and up, then down. By the
  // node's own threads: whoever touches memory first decides where it lies.
  void pack(int node, int64_t layer, int64_t expert, const ExpertMatrices& matrices, int64_t begin,
            int64_t end) const;

  // Where the expert lies: on each node at most two pieces, in ascending order of offsets.
  std::vector<ExpertRegion> regions(int64_t layer, int64_t expert) const;

  // An expert as its panels hold it, dequantised: gate and up (intermediate, hidden), down (hidden,
  // intermediate).
  void unpack(int64_t layer, int64_t expert, float* gate, float* up, float* down) const;

 private:
  int64_t place(int64_t layer, int64_t expert) const {
    const int64_t number = layer * shape_.num_experts + expert;
    return places_.empty() ? number : places_[number];
  }

  ExpertsShape shape_;
  std::vector<int64_t> places_;  // of each expert among those that are here; empty: all are
  std::vector<ExpertSlice> slices_;
  std::vector<std::unique_ptr<Arena>> arenas_;
};

}  // namespace hybridk2
