// Counter-based random numbers, Philox4x32-10, shared by cpu/ and cuda/. Definition: repdeg_fast/reference/philox.py.
//
// Straight-line scalar code: a CUDA thread makes four words with it, and a loop over column quads marked `omp simd`
// becomes vector code on the CPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define REPDEG_FAST_INLINE __host__ __device__ __forceinline__
#else
#define REPDEG_FAST_INLINE inline __attribute__((always_inline))
#endif

namespace repdeg_fast {

constexpr uint32_t kGumbelStream = 0, kDropoutStream = 1;

// The words of columns 4·quad … 4·quad + 3.
struct PhiloxWords {
  uint32_t lane[4];
};

REPDEG_FAST_INLINE PhiloxWords philox(uint64_t seed, uint32_t quad, uint32_t row, uint32_t stream) {
  uint32_t c0 = quad, c1 = row, c2 = stream, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(c0) * 0xD2511F53u, second = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(second >> 32) ^ c1 ^ k0;
    c1 = uint32_t(second);
    c2 = uint32_t(first >> 32) ^ c3 ^ k1;
    c3 = uint32_t(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// In (0, 1): exact in fp32, never 0 or 1.
REPDEG_FAST_INLINE float philox_uniform(uint32_t word) { return (float(int32_t(word >> 9)) + 0.5f) * 0x1p-23f; }

}  // namespace repdeg_fast
