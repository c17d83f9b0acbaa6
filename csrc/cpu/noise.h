// Rows of random words and of Gumbel noise for CPU kernels. Definition: repdeg_fast/reference/philox.py.
#pragma once

#include <cstdint>

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

inline __attribute__((always_inline)) float gumbel_noise(uint32_t word) {
  return -vector_log(-vector_log(philox_uniform(word)));
}

}  // namespace repdeg_fast
