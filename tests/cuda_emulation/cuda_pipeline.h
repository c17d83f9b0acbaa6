// Asynchronous copies of a thread's own, in groups that arrive when it waits for them.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulation::check_aligned(to, bytes);
  emulation::check_aligned(from, bytes);
  emulation::current->copies.back().push_back(emulation::begin_copy({to, from, bytes}));
}
inline void __pipeline_commit() { emulation::current->copies.emplace_back(); }
inline void __pipeline_wait_prior(int prior) {  // for all but the last `prior` groups
  auto& groups = emulation::current->copies;
  for (; int(groups.size()) - 1 > prior; groups.erase(groups.begin())) emulation::land(groups.front());
}
