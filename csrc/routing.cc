#include "routing.h"

namespace hybridk2 {

Routing route(const int32_t* expert_ids, const float* weights, int64_t num_tokens, int64_t top_k,
              int64_t num_experts) {
  Routing routing;
  std::vector<int64_t> next_slot(num_experts, 0);  // first counts, then places
  routing.token_begin.assign(num_tokens + 1, 0);
  for (int64_t token = 0; token < num_tokens; ++token) {
    int64_t chosen = 0;
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t expert = expert_ids[token * top_k + k];
      if (expert < 0) continue;
      ++next_slot[expert];
      ++chosen;
    }
    routing.token_begin[token + 1] = routing.token_begin[token] + chosen;
  }
  int64_t num_slots = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int64_t tokens = next_slot[expert];
    next_slot[expert] = num_slots;
    if (tokens > 0) routing.runs.push_back({static_cast<int32_t>(expert), num_slots, tokens});
    num_slots += tokens;
  }
  routing.slots.resize(num_slots);
  for (int64_t i = 0; i < num_tokens * top_k; ++i) {
    if (expert_ids[i] >= 0) routing.slots[next_slot[expert_ids[i]]++] = {i / top_k, weights[i]};
  }
  routing.slots_of_tokens.resize(num_slots);
  std::vector<int64_t> next_place(routing.token_begin.begin(), routing.token_begin.end() - 1);
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    routing.slots_of_tokens[next_place[routing.slots[slot].token]++] = slot;
  }
  return routing;
}

}  // namespace hybridk2
