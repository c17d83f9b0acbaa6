// log of a whole vector of positive normal numbers, which is all that random numbers need.
#pragma once

#include "vector_math.h"

namespace repdeg_fast {

// x = 2^e·m with m in [√½, √2), log x = e·log 2 + log(1 + f), f = m − 1 exactly. log(1 + f) = f − f²/2 + f³·P(f), P a
// minimax fit (relative error of the sum 3e-8 before rounding): accurate relative to log x also near x = 1, where it
// vanishes and where −log u of the largest Gumbel noise lies.
inline FloatVector log(FloatVector x) {
  const IntVector exponent = (as_int(x) - 0x3f3504f3) >> 23;
  const FloatVector f = as_float(as_int(x) - (exponent << 23)) - 1.f;
  const FloatVector e = __builtin_convertvector(exponent, FloatVector);
  FloatVector p = 0.0870043039f * f - 0.142674863f;
  p = p * f + 0.149147689f;
  p = p * f - 0.165775850f;
  p = p * f + 0.199630633f;
  p = p * f - 0.250013381f;
  p = p * f + 0.333339095f;
  // log 2 in two parts, the first exact when multiplied by an exponent
  return f + (f * f * (p * f - 0.5f) - e * 2.12194440e-4f) + e * 0.693359375f;
}

inline DoubleVector log(DoubleVector x) {
  for (int i = 0; i < Vector<double>::lanes; ++i) x[i] = std::log(x[i]);
  return x;
}

}  // namespace repdeg_fast
