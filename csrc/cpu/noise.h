// Rows of random words, and Gumbel noise from them, for CPU kernels. Definition: repdeg_fast/reference/philox.py.
#pragma once

#include "../philox.h"
#include "logarithm.h"

namespace repdeg_fast {

// The words of `columns` columns from 4·quad on into `out`, which has room for a multiple of four.
inline void fill_words(uint32_t* __restrict out, uint64_t seed, uint32_t row, uint32_t stream, uint32_t quad,
                       int64_t columns) {
  const int64_t quads = (columns + 3) / 4;
#pragma omp simd
  for (int64_t i = 0; i < quads; ++i) {
    const PhiloxWords words = philox(seed, quad + uint32_t(i), row, stream);
    out[4 * i] = words.lane[0];
    out[4 * i + 1] = words.lane[1];
    out[4 * i + 2] = words.lane[2];
    out[4 * i + 3] = words.lane[3];
  }
}

// −log(−log u) of a vector of words, in the arithmetic of A.
template <typename A>
inline typename Vector<A>::type gumbel_noise(const uint32_t* words) {
  typename Vector<A>::type u;
  for (int64_t i = 0; i < Vector<A>::lanes; ++i) u[i] = philox_uniform(words[i]);
  return -log(-log(u));
}

}  // namespace repdeg_fast
