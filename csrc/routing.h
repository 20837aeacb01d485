// From the router's choice, token by token, to the work, expert by expert.
#pragma once

#include <cstdint>
#include <vector>

namespace hybridk2 {

// One (token, expert) pair of a call.
struct Slot {
  int64_t token;
  float weight;
};

// The slots [first_slot, first_slot + num_tokens) of one expert.
struct ExpertRun {
  int32_t expert;
  int64_t first_slot;
  int64_t num_tokens;
};

struct Routing {
  std::vector<Slot> slots;      // by ascending expert, then token, then place in the token's row
  std::vector<ExpertRun> runs;  // experts with at least one token, ascending
  // Slots of token t, hence by ascending expert:
  // slots_of_tokens[token_begin[t] .. token_begin[t + 1]).
  std::vector<int64_t> slots_of_tokens;
  std::vector<int64_t> token_begin;
};

// expert_ids, weights: (num_tokens, top_k). An id of -1 gives no slot; others are below
// num_experts.
Routing route(const int32_t* expert_ids, const float* weights, int64_t num_tokens, int64_t top_k,
              int64_t num_experts);

}  // namespace hybridk2
