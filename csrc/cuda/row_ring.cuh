// Rows of matrices on their way from memory into a ring of stages in shared memory, several rows ahead of the one that
// is worked on.
//
// Why it is fast: 4.3 TB/s over 132 multiprocessors, with 0.7 to 1 µs from a request to its data, are 23 to 33 KB that
// must be on their way to each multiprocessor at all times. Rows that wait in registers cost the warps that would ask for
// more; these cost shared memory, of which there are 227 KB. From compute capability 9.0 on a row is one instruction of
// one thread, a bulk copy, which takes no address, register or instruction of the other threads; before it, and for rows
// too short to be worth a bulk copy, each thread copies its own 16 bytes at a time, and reads only these.
#pragma once

#include <cuda_pipeline.h>

#include "ptx.cuh"
#include "rows.cuh"

namespace repdeg_fast {
namespace {

constexpr int kMostStages = 3;
constexpr int kLeastBulkBytes = 1024;  // of a row: a bulk copy has a price of its own

// Of one group of threads, which meet between the last reading of a stage and its filling. Row parts of `row_bytes`, of
// kStreams matrices a stage. fill() and wait() are called by the whole group, as often with or without a row that is
// there; the rows that are not come last.
template <typename T, int kStreams>
struct RowRing {
  static constexpr int kPack = sizeof(uint4);

  unsigned char* stages;
  uint64_t* barriers;
  int row_bytes, number_of_stages, lane, threads;
  bool bulk;
  int filling = 0, reading = 0, ahead = 0;  // stages; fills that were begun beyond those that were read
  uint32_t parity = 0;

  // Shared memory of a block of `groups`.
  static size_t bytes(int groups, int row_bytes, int stages) {
    return size_t(groups) * stages * (kStreams * row_bytes + sizeof(uint64_t));
  }

  // By all threads of a block. `shared` has the size of bytes().
  __device__ RowRing(void* shared, int row_bytes, int number_of_stages, int group, int groups, int lane, int threads,
                     bool worth_bulk)
      : row_bytes(row_bytes), number_of_stages(number_of_stages), lane(lane), threads(threads),
        bulk(ptx::kHasBulkCopies && worth_bulk) {
    const int group_bytes = number_of_stages * kStreams * row_bytes;
    stages = static_cast<unsigned char*>(shared) + group * group_bytes;
    barriers = reinterpret_cast<uint64_t*>(static_cast<unsigned char*>(shared) + groups * group_bytes) +
               group * number_of_stages;
    if (!bulk) return;
    if (lane == 0)
#pragma unroll 1
      for (int s = 0; s < number_of_stages; ++s) ptx::mbarrier_init(barriers + s, 1);
    ptx::fence_before_bulk_copies();
    __syncthreads();
  }

  // Begins to fill `count` stages; fetch(i) the i-th of them.
  template <typename F>
  __device__ static void begin(int count, F&& fetch) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) fetch(i);
  }

  // Begins to fill the next stage; source(stream): the row of this matrix, or null.
  template <typename F>
  __device__ void fill(bool there, F&& source) {
    unsigned char* to = stages + filling * kStreams * row_bytes;
    if (bulk) {
      if (there && lane == 0) {
        const T* rows[kStreams];
        int wanted = 0;
#pragma unroll
        for (int stream = 0; stream < kStreams; ++stream) wanted += (rows[stream] = source(stream)) != nullptr;
        ptx::fence_before_bulk_copies();
        ptx::mbarrier_arrive_expect(barriers + filling, wanted * row_bytes);
#pragma unroll
        for (int stream = 0; stream < kStreams; ++stream)
          if (rows[stream]) ptx::bulk_copy(to + stream * row_bytes, rows[stream], row_bytes, barriers + filling);
      }
    } else {
#pragma unroll
      for (int stream = 0; stream < kStreams; ++stream) {
        const unsigned char* row = there ? reinterpret_cast<const unsigned char*>(source(stream)) : nullptr;
        if (row)
          for (int at = lane * kPack; at < row_bytes; at += threads * kPack)
            __pipeline_memcpy_async(to + stream * row_bytes + at, row + at, kPack);
      }
      __pipeline_commit();
    }
    ++ahead;
    if (++filling == number_of_stages) filling = 0;
  }

  // For the row that is to be read next.
  __device__ void wait(bool there) const {
    if (!bulk) {
      __pipeline_wait_prior(ahead - 1);
    } else if (there) {
      while (!ptx::mbarrier_try_wait(barriers + reading, parity)) {
      }
    }
  }

  // Of this row, which has been waited for.
  __device__ const T* row(int stream) const {
    return reinterpret_cast<const T*>(stages + (reading * kStreams + stream) * row_bytes);
  }

  // Turns to the next row.
  __device__ void next() {
    --ahead;
    if (++reading == number_of_stages) reading = 0, parity ^= 1;
  }
};

struct RingSize {
  int stages;
  size_t bytes;  // of a block
};

// For a block of `groups` that hold `columns` of a row: kMostStages, or as many as the device has room for.
template <typename T, int kStreams>
RingSize ring_size(int groups, int64_t columns) {
  constexpr size_t kStatic = 2048;  // what kernels have beside it
  int device = 0, room = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const auto bytes = [&](int stages) {
    return RowRing<T, kStreams>::bytes(groups, int(columns * sizeof(T)), stages);
  };
  int stages = kMostStages;
  while (stages > 1 && bytes(stages) + kStatic > size_t(room)) --stages;
  return {stages, bytes(stages)};
}

}  // namespace
}  // namespace repdeg_fast
