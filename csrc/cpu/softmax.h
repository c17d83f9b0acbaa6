// The softmax of a row of logits in L2: its largest value, and the sum of exponentials relative to that.
#pragma once

#include <algorithm>
#include <cmath>

#include "vector_math.h"

namespace repdeg_fast {

template <typename A>
inline A maximum(const A* z, int64_t n) {
  constexpr int64_t L = Vector<A>::lanes;
  auto most = broadcast(A(-INFINITY));
  int64_t i = 0;
  for (; i + L <= n; i += L) most = load(z + i) > most ? load(z + i) : most;  // NaN is left to the sum
  A result = -INFINITY;
  for (; i < n; ++i) result = std::max(result, z[i]);
  for (int64_t k = 0; k < L; ++k) result = std::max(result, A(most[k]));
  return result;
}

// Σ f(z): `f` maps a vector; a shorter rest is padded with `neutral`, which f must send to 0.
template <typename A, typename F>
inline A sum_of(const A* z, int64_t n, A neutral, F&& f) {
  constexpr int64_t L = Vector<A>::lanes;
  typename Vector<A>::type sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    sum[0] += f(load(z + i));
    sum[1] += f(load(z + i + L));
  }
  for (; i < n; i += L) {
    auto rest = broadcast(neutral);
    for (int64_t k = 0; k < std::min(L, n - i); ++k) rest[k] = z[i + k];
    sum[0] += f(rest);
  }
  const auto all = sum[0] + sum[1];
  A total = 0;
  for (int64_t k = 0; k < L; ++k) total += all[k];
  return total;
}

// The softmax of a row is exp(z − origin)/sum. With the maximum as origin it is as exact for logits far from zero as for
// others, which their log-sum-exp, rounded to fp32, would not be; a row of −∞ alone keeps 0 as origin.
template <typename A>
struct Softmax {
  A origin, sum;

  static Softmax of(const A* z, int64_t n) {
    A most = maximum(z, n);
    if (most == A(-INFINITY)) most = 0;
    return {most, sum_of(z, n, A(-INFINITY), [&](auto v) { return exp(v - most); })};
  }
};

}  // namespace repdeg_fast
