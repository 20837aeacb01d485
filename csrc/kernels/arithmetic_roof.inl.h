// What the kernels' multiplication could reach at best: the very instruction, register to register,
// in enough independent chains to hide its latency. Included inside an anonymous namespace after
// the instruction set's primitives; also needs kColumnsPerElement.

int64_t arithmetic_roof(const ArithmeticTask& task) {
  constexpr int kChains = 12;
  const Weight weight = decode<0>(load_line(task.line));
  const Element element = broadcast(task.element);
  // The compiler does not know that the chains start alike, so it computes every one of them.
  Sum sums[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sums[i] = load(task.sums + i * kRowsPerVector);
  for (int64_t round = 0; round < task.rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sums[i] = multiply_add(weight, element, sums[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) store(task.sums + i * kRowsPerVector, sums[i]);
  return task.rounds * kChains * kRowsPerVector * kColumnsPerElement * 2;
}
