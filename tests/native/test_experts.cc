// The experts in plain C++, to run under sanitizers and emulators: every instruction set this CPU
// has, against fp64, over shapes with and without padding, decode and prefill paths, bit for bit on
// other thread counts and NUMA nodes and in other company. Prints the instruction sets it ran.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "errors.h"
#include "experts.h"

using namespace hybridk2;

namespace {

float widen(uint16_t bf16) {
  const uint32_t bits = uint32_t{bf16} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Matrix {
  int64_t rows, columns;
  std::vector<uint32_t> words;
  std::vector<uint16_t> scales;

  Matrix(int64_t rows, int64_t columns, std::mt19937& random)
      : rows(rows), columns(columns), words(rows * columns / 8), scales(rows * columns / 32) {
    for (uint32_t& word : words) word = random();
    for (uint16_t& scale : scales) scale = to_bf16(0.02f + 0.0001f * (random() % 100));
  }
  PackedMatrix packed() const { return {words.data(), scales.data()}; }
  double at(int64_t r, int64_t c) const {
    const int nibble = words[(r * columns + c) / 8] >> (4 * (c % 8)) & 15;
    return (nibble - 8) * static_cast<double>(widen(scales[(r * columns + c) / 32]));
  }
  std::vector<double> times(const std::vector<double>& x) const {
    std::vector<double> y(rows, 0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) y[r] += at(r, c) * x[c];
    }
    return y;
  }
};

struct Expert {
  Matrix gate, up, down;

  std::vector<double> operator()(const std::vector<double>& x, bool bf16) const {
    std::vector<double> g = gate.times(x);
    const std::vector<double> u = up.times(x);
    for (size_t i = 0; i < g.size(); ++i) {
      g[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
      if (bf16) g[i] = widen(to_bf16(static_cast<float>(g[i])));
    }
    return down.times(g);
  }
};

struct Call {
  int64_t tokens, top_k, hidden;
  std::vector<uint16_t> bf16;
  std::vector<float> fp32;
  std::vector<int32_t> ids;
  std::vector<float> weights;

  Call(int64_t tokens, int64_t top_k, int64_t hidden, int64_t num_experts, std::mt19937& random)
      : tokens(tokens), top_k(top_k), hidden(hidden) {
    for (int64_t i = 0; i < tokens * hidden; ++i) {
      bf16.push_back(to_bf16(static_cast<float>(static_cast<int>(random() % 2001) - 1000) * 1e-3f));
      fp32.push_back(widen(bf16.back()));
    }
    for (int64_t i = 0; i < tokens * top_k; ++i) {
      ids.push_back(static_cast<int32_t>(random() % (num_experts + 1)) - 1);
      weights.push_back(0.1f + 0.001f * (random() % 1000));
    }
  }

  std::vector<float> run(Experts& experts, Precision precision, int64_t begin,
                         int64_t count) const {
    // Exactly as large as promised: a sanitizer sees the first byte beyond.
    const size_t bytes = count * hidden * bytes_of(precision);
    const uint8_t* source = precision == Precision::kBf16
                                ? reinterpret_cast<const uint8_t*>(bf16.data())
                                : reinterpret_cast<const uint8_t*>(fp32.data());
    std::vector<uint8_t> x(source + begin * hidden * bytes_of(precision),
                           source + begin * hidden * bytes_of(precision) + bytes);
    std::vector<float> out(count * hidden, -1.0f);
    experts
        .submit({0, count, top_k, x.data(), precision, ids.data() + begin * top_k,
                 weights.data() + begin * top_k, out.data()})
        ->wait();
    return out;
  }
};

void load(Experts& experts, const std::vector<Expert>& made) {
  for (size_t e = 0; e < made.size(); ++e) {
    experts.load(0, static_cast<int64_t>(e),
                 {made[e].gate.packed(), made[e].up.packed(), made[e].down.packed()});
  }
}

void compare(const std::vector<Expert>& made, const Call& call, const std::vector<float>& out,
             bool bf16) {
  for (int64_t t = 0; t < call.tokens; ++t) {
    std::vector<double> x(call.fp32.begin() + t * call.hidden,
                          call.fp32.begin() + (t + 1) * call.hidden);
    std::vector<double> expected(call.hidden, 0);
    double size = 1e-3;
    for (int64_t k = 0; k < call.top_k; ++k) {
      const int32_t expert = call.ids[t * call.top_k + k];
      if (expert < 0) continue;
      const std::vector<double> y = made[expert](x, bf16);
      for (int64_t j = 0; j < call.hidden; ++j) {
        expected[j] += call.weights[t * call.top_k + k] * y[j];
        size = std::max(size, std::fabs(expected[j]));
      }
    }
    // The derived element-wise bounds are tests/test_experts_kernels.py's; here a wrong lane must
    // show.
    for (int64_t j = 0; j < call.hidden; ++j) {
      CHECK(std::fabs(out[t * call.hidden + j] - expected[j]) <= 2e-3 * size);
    }
  }
}

void test_isa(const std::string& isa, int64_t hidden, int64_t intermediate) {
  std::mt19937 random(7);
  constexpr int64_t kExperts = 3;
  std::vector<Expert> made;
  for (int64_t e = 0; e < kExperts; ++e) {
    made.push_back({Matrix(intermediate, hidden, random), Matrix(intermediate, hidden, random),
                    Matrix(hidden, intermediate, random)});
  }
  Experts one({1, kExperts, hidden, intermediate}, isa, 1, false);
  Experts three({1, kExperts, hidden, intermediate}, isa, 3, true);
  Experts spread({1, kExperts, hidden, intermediate}, isa, 5, true, simulated_nodes(3));
  CHECK(one.isa() == isa);
  CHECK(spread.threads_of_node().size() == 3);
  load(one, made);
  load(three, made);
  load(spread, made);
  for (const Precision precision : {Precision::kBf16, Precision::kFp32}) {
    for (const int64_t tokens : {0, 1, 2, 7, 13, 30}) {
      const Call call(tokens, 2, hidden, kExperts, random);
      const std::vector<float> out = call.run(one, precision, 0, tokens);
      compare(made, call, out, precision == Precision::kBf16);
      CHECK(out == call.run(three, precision, 0, tokens));
      CHECK(out == call.run(spread, precision, 0, tokens));
    }
    const Call many(700, 2, hidden, kExperts, random);  // several blocks, added in place
    const std::vector<float> out = many.run(three, precision, 0, many.tokens);
    CHECK(out == many.run(spread, precision, 0, many.tokens));
    for (const int64_t begin : {0, 333, 693}) {
      const std::vector<float> few = many.run(one, precision, begin, 7);
      CHECK(std::memcmp(few.data(), out.data() + begin * hidden, few.size() * sizeof(float)) == 0);
    }
  }
}

void test_refusals() {
  CHECK_THROWS(ConfigurationError, Experts({1, 1, 64, 32}, "mmx", 1, false));
  CHECK_THROWS(std::invalid_argument, Experts({1, 1, 63, 32}, "", 1, false));
  CHECK_THROWS(OutOfMemoryError, Experts({1 << 15, 1 << 15, 7168, 2048}, "", 1, false));
  Experts experts({1, 2, 64, 32}, "", 2, true);
  std::vector<float> x(64), out(64);
  const float weight = 1;
  for (const int32_t expert : {2, -2}) {
    CHECK_THROWS(std::invalid_argument, experts.submit({0, 1, 1, x.data(), Precision::kFp32,
                                                        &expert, &weight, out.data()}));
  }
  const int32_t missing = 1;
  CHECK_THROWS(StateError, experts.submit({0, 1, 1, x.data(), Precision::kFp32, &missing, &weight,
                                           out.data()}));
}

}  // namespace

int main() {
  std::vector<std::string> isas = available_isas();
  isas.emplace_back("amx_emulated");
  for (const std::string& isa : isas) {
    for (const auto& [hidden, intermediate] : {std::pair{64, 32}, {96, 160}, {128, 64}}) {
      test_isa(isa, hidden, intermediate);
    }
    std::printf("%s ", isa.c_str());
  }
  test_refusals();
  std::printf("%s\n", failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
