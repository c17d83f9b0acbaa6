// What csrc/cuda/ptx.cuh has as instructions: barriers in shared memory that count bytes, and bulk copies.
#pragma once

#include "cuda_runtime.h"

namespace repdeg_fast::ptx {

inline const bool& kHasBulkCopies = emulation::bulk_copies;

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulation::check_aligned(barrier, sizeof(*barrier));
  emulation::mbarriers[barrier] = {arrivals, arrivals};
}

inline emulation::Mbarrier& mbarrier(const uint64_t* barrier) {
  static emulation::Mbarrier none;
  const auto found = emulation::mbarriers.find(barrier);
  if (found != emulation::mbarriers.end()) return found->second;
  emulation::refuse("a barrier is used before it is made");
  return none = {};
}

inline void end_phase(emulation::Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes > 0) return;
  if (barrier.bytes < 0 || barrier.pending < 0) emulation::refuse("more came to a barrier than it expected");
  barrier.parity ^= 1;
  barrier.pending = barrier.arrivals;
  ++emulation::progress;
}

inline void mbarrier_arrive_expect(uint64_t* address, uint32_t bytes) {
  emulation::Mbarrier& barrier = mbarrier(address);
  barrier.bytes += bytes;
  --barrier.pending;
  ++emulation::progress;
  end_phase(barrier);
}

inline bool mbarrier_try_wait(uint64_t* address, uint32_t parity) {
  emulation::Mbarrier& barrier = mbarrier(address);
  if (barrier.parity != parity) return true;
  for (const emulation::Copy& copy : barrier.on_their_way) barrier.bytes -= copy.bytes;
  emulation::land(barrier.on_their_way);
  end_phase(barrier);
  if (barrier.parity != parity) return true;
  emulation::yield();
  return false;
}

inline void fence_before_bulk_copies() { emulation::current->fenced = true; }

inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  emulation::check_aligned(to, 16);
  emulation::check_aligned(from, 16);
  if (bytes % 16) emulation::refuse("a bulk copy of bytes that are no multiple of 16");
  if (!emulation::current->fenced) emulation::refuse("a bulk copy without a fence after its thread met others");
  mbarrier(barrier).on_their_way.push_back(emulation::begin_copy({to, from, bytes}));
}

}  // namespace repdeg_fast::ptx
