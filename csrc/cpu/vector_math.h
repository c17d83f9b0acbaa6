// exp and tanh of a whole vector, and vectors of 16-bit storage read and written as fp32.
//
// libm's scalar calls would cost more than everything else a softmax does. The polynomials were fitted here (least
// squares reweighted towards the minimax error); fp32 results are within 2 ulp of the true value, subnormal results
// included, NaN stays NaN, exp(-Inf) = 0 and exp of an overflow is Inf. Doubles go through libm, lane by lane: they
// serve gradcheck, not training.
#pragma once

#include <cmath>

#include "rows.h"

namespace repdeg_fast {

using FloatVector = Vector<float>::type;
using DoubleVector = Vector<double>::type;
typedef int32_t IntVector __attribute__((vector_size(64)));
typedef uint16_t ShortVector __attribute__((vector_size(32), aligned(2), may_alias));

inline FloatVector as_float(IntVector v) { return reinterpret_cast<FloatVector&>(v); }
inline IntVector as_int(FloatVector v) { return reinterpret_cast<IntVector&>(v); }
inline FloatVector broadcast(float x) { return FloatVector{} + x; }
inline DoubleVector broadcast(double x) { return DoubleVector{} + x; }

// exp(x) = 2^n exp(r) with n = round(x / ln 2), |r| <= ln 2 / 2.
inline FloatVector exp(FloatVector x) {
  const float kRound = 12582912.f;  // 1.5·2^23: adding it rounds to an integer, which is then in the low bits
  x = x < -104.f ? broadcast(-104.f) : x;  // comparisons with NaN are false, so NaN passes
  x = x > 89.f ? broadcast(89.f) : x;
  const FloatVector shifted = x * 1.44269504f + kRound;
  const IntVector n = as_int(shifted) - as_int(broadcast(kRound));
  const FloatVector whole = shifted - kRound;
  const FloatVector r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;  // ln 2 in two parts, the first short
  FloatVector p = broadcast(1.3946133e-3f) + r * 1.9917895e-4f;
  p = 8.3332649e-3f + r * p;
  p = 4.1666269e-2f + r * p;
  p = 1.6666667e-1f + r * p;
  p = 0.5f + r * p;
  p = 1.f + (r + r * r * p);
  const IntVector half = n >> 1;  // 2^n in two factors: the product may be subnormal, neither factor is
  return p * as_float((half + 127) << 23) * as_float((n - half + 127) << 23);
}

inline DoubleVector exp(DoubleVector x) {
  for (int i = 0; i < Vector<double>::lanes; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Near zero an odd polynomial, elsewhere 1 − 2/(exp(2|x|) + 1) with the sign of x.
inline FloatVector tanh(FloatVector x) {
  const FloatVector s = x * x;
  FloatVector q = 2.048331e-2f - s * 5.52863e-3f;
  q = -5.369296e-2f + s * q;
  q = 1.3330899e-1f + s * q;
  q = -3.3333263e-1f + s * q;
  const FloatVector small = x + x * s * q;
  const FloatVector size = x < 0.f ? -x : x;
  const FloatVector large = 1.f - 2.f / (exp(2.f * size) + 1.f);
  return size < 0.65f ? small : (x < 0.f ? -large : large);
}

inline DoubleVector tanh(DoubleVector x) {
  for (int i = 0; i < Vector<double>::lanes; ++i) x[i] = std::tanh(x[i]);
  return x;
}

template <typename A>
inline A exp_scalar(A x) {
  return exp(broadcast(x))[0];
}

// 16 stored values as fp32 (8 doubles as they are), and back with round-to-nearest-even.
inline FloatVector load_values(const float* p) { return load(p); }
inline DoubleVector load_values(const double* p) { return load(p); }
inline FloatVector load_values(const BFloat16* p) {
  const auto bits = *reinterpret_cast<const ShortVector*>(p);
  return as_float(__builtin_convertvector(bits, IntVector) << 16);
}
inline FloatVector load_values(const Half* p) {
  FloatVector v;
  for (int i = 0; i < Vector<float>::lanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}

inline void store_values(float* p, FloatVector v) { store(p, v); }
inline void store_values(double* p, DoubleVector v) { store(p, v); }
inline void store_values(BFloat16* p, FloatVector v) {
  IntVector bits = as_int(v);
  bits += 0x7fff + ((bits >> 16) & 1);
  bits = v == v ? bits : IntVector{} + 0x7fc00000;  // rounding could carry a NaN over into a number
  *reinterpret_cast<ShortVector*>(p) = __builtin_convertvector((bits >> 16) & 0xffff, ShortVector);
}
inline void store_values(Half* p, FloatVector v) {
  for (int i = 0; i < Vector<float>::lanes; ++i) p[i] = static_cast<Half>(v[i]);
}

}  // namespace repdeg_fast
