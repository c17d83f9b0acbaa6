// A natural logarithm that loops vectorize: libm's is a call a value. For positive normal numbers only.
#pragma once

#include <cstdint>
#include <cstring>

namespace repdeg_fast {

// x = 2^e·m with m in [√½, √2), log x = e·log 2 + log(1 + f), f = m − 1 exactly. log(1 + f) = f − f²/2 + f³·P(f), P a
// minimax fit (relative error of the sum 3e-8 before rounding): accurate relative to log x also near x = 1, where it
// vanishes and where −log u of the largest Gumbel noise lies.
inline __attribute__((always_inline)) float vector_log(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent << 23;
  float m;
  std::memcpy(&m, &bits, sizeof m);
  const float f = m - 1, e = float(exponent);
  float p = 0.0870043039f;
  p = p * f - 0.142674863f;
  p = p * f + 0.149147689f;
  p = p * f - 0.165775850f;
  p = p * f + 0.199630633f;
  p = p * f - 0.250013381f;
  p = p * f + 0.333339095f;
  const float square = f * f;
  // log 2 in two parts, the first exact when multiplied by an exponent
  return f + (square * (p * f - 0.5f) + e * -2.12194440e-4f) + e * 0.693359375f;
}

}  // namespace repdeg_fast
