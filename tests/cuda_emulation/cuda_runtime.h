// Enough of CUDA to run our kernels on a CPU, one block after the other: every CUDA thread is a fiber, a barrier is a
// switch to the next one. Slow, single-threaded, and a check of indexing, reductions and arithmetic on any machine;
// it says nothing of speed, of memory ordering between blocks, or of races between barriers. Asynchronous copies spoil where
// they go when they begin, and arrive when they are waited for: as early and as late as a GPU might.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static

namespace emulation {

// What a GPU would refuse, or would not come back from. The launch that did it fails at its end: a fiber has no stack to
// throw through.
inline const char* fault = nullptr;
inline void refuse(const char* why) {
  if (!fault) fault = why;
}

// An address that a GPU would refuse to move so many bytes to or from at once.
inline void check_aligned(const void* address, size_t bytes) {
  asm volatile("" : "+r"(address));  // or the compiler concludes from the type that it is aligned
  if (reinterpret_cast<uintptr_t>(address) % bytes) refuse("a kernel moved a vector from or to where it is not aligned");
}

// A type of kBytes that is read and written as one.
#define EMULATED_VECTOR(Name, kBytes)                                         \
  struct alignas(kBytes) Name : Name##_values {                               \
    Name() = default;                                                         \
    template <typename... Values>                                             \
    Name(Values... values) : Name##_values{values...} {}                      \
    Name(const Name& other) : Name##_values(checked(other)) {}                \
    Name& operator=(const Name& other) {                                      \
      ::emulation::check_aligned(this, kBytes);                               \
      Name##_values::operator=(checked(other));                               \
      return *this;                                                           \
    }                                                                         \
    static const Name& checked(const Name& other) {                           \
      ::emulation::check_aligned(&other, kBytes);                             \
      return other;                                                           \
    }                                                                         \
  }

}  // namespace emulation

struct uint4_values { uint32_t x, y, z, w; };
struct uint2_values { uint32_t x, y; };
struct float4_values { float x, y, z, w; };
struct float2_values { float x, y; };
EMULATED_VECTOR(uint4, 16);
EMULATED_VECTOR(uint2, 8);
EMULATED_VECTOR(float4, 16);
EMULATED_VECTOR(float2, 8);
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

namespace emulation {

constexpr size_t kStack = 256 << 10;
constexpr size_t kSharedBytes = 99 << 10;  // of a block at most, where there is least (compute capability 8.6)

struct Barrier {
  int size = 0, arrived = 0, generation = 0;
};

// An asynchronous copy on its way.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// A barrier in shared memory that counts arrivals and bytes.
struct Mbarrier {
  int arrivals, pending;
  int64_t bytes = 0;  // expected, less those that came
  uint32_t parity = 0;  // of the phase that has not ended
  std::vector<Copy> on_their_way;
};

// Entered by its context, left and entered again by jumps: swapcontext would ask the system for signal masks each time.
struct Fiber {
  ucontext_t context;
  jmp_buf state;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  bool started, done, fenced;          // against asynchronous copies, since it last met other threads
  std::vector<std::vector<Copy>> copies;  // of its own: groups, of which the last is open
};

inline std::vector<Fiber> fibers;  // as many as the largest block had
inline jmp_buf scheduler;
inline Fiber* current = nullptr;
inline dim3 block, block_size, grid_size;
inline std::vector<Barrier> warp_barriers;
inline Barrier block_barrier;
inline std::vector<uint64_t> exchange;        // one value a thread, for shuffles
inline std::vector<char> dynamic_shared;
inline std::map<const void*, Mbarrier> mbarriers;
inline size_t progress;  // arrivals, and ends of threads and phases: without one in all threads they wait for ever
inline bool bulk_copies = true;  // whether the device has them
inline std::function<void()> body;

inline void yield() {
  if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier) {
  const int mine = barrier.generation;
  ++progress;
  current->fenced = false;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == mine) yield();
}

inline int thread_index() { return current->thread.x; }

// Spoils the copy's target, in shared memory, until it arrives.
inline Copy begin_copy(const Copy& copy) {
  char* to = static_cast<char*>(copy.to);
  if (to < dynamic_shared.data() || to + copy.bytes > dynamic_shared.data() + dynamic_shared.size() - 16)
    return refuse("a copy goes outside of the block's shared memory"), Copy{};
  std::memset(copy.to, 0xff, copy.bytes);
  return copy;
}

inline void land(std::vector<Copy>& copies) {
  for (const Copy& copy : copies)
    if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
  copies.clear();
}

inline void enter() {
  body();
  ++progress;
  current->done = true;
  yield();
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void run_block() {
  const int threads = block_size.x;
  if (int(fibers.size()) < threads) fibers = std::vector<Fiber>(threads);
  warp_barriers.assign((threads + 31) / 32, Barrier{});
  for (int t = 0; t < threads; ++t) ++warp_barriers[t / 32].size;
  block_barrier = Barrier{threads};
  mbarriers.clear();
  exchange.assign(threads, 0);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.thread = dim3(t, 0, 0);
    fiber.started = fiber.done = fiber.fenced = false;
    fiber.copies.assign(1, {});
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool running = true; running && !fault;) {
    running = false;
    const size_t before = progress;
    for (int t = 0; t < threads; ++t) {
      if (fibers[t].done) continue;
      resume(fibers[t]);
      running = true;
    }
    if (running && progress == before) refuse("all threads of a block wait, for nothing that comes");
  }
  bool left = false;
  for (const auto& [address, barrier] : mbarriers) left |= !barrier.on_their_way.empty();
  for (int t = 0; t < threads; ++t)
    for (const auto& group : fibers[t].copies) left |= !group.empty();
  if (left) refuse("a block ended before its copies had come");
}

// launch(kernel, grid, block, shared bytes)(arguments): what `kernel<<<...>>>(arguments)` is rewritten to.
template <typename Kernel>
auto launch(Kernel kernel, dim3 grid, dim3 threads, size_t shared_bytes = 0, cudaStream_t = nullptr) {
  return [=](auto... arguments) {
    STD_TORCH_CHECK(threads.y == 1 && threads.z == 1, "the emulation has one-dimensional blocks only");
    STD_TORCH_CHECK(shared_bytes <= kSharedBytes, "a block asks for more shared memory than there is: ", shared_bytes);
    const char* capability = std::getenv("EMULATED_COMPUTE_CAPABILITY");
    bulk_copies = !capability || std::atoi(capability) >= 90;
    grid_size = grid;
    block_size = threads;
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x && !fault; ++x) {
          block = dim3(x, y, z);
          dynamic_shared.assign(shared_bytes + 16, char(0xff));  // poison: nothing may be read before it is written
          body = [&] { kernel(arguments...); };
          run_block();
        }
    const char* why = std::exchange(fault, nullptr);
    STD_TORCH_CHECK(!why, why);
  };
}

template <typename T>
T shuffle(T value, int source_lane) {
  static_assert(sizeof(T) <= 8);
  const int index = thread_index(), warp = index / 32;
  std::memcpy(&exchange[index], &value, sizeof(T));
  wait(warp_barriers[warp]);
  T received;
  std::memcpy(&received, &exchange[warp * 32 + source_lane], sizeof(T));
  wait(warp_barriers[warp]);
  return received;
}

}  // namespace emulation

#define threadIdx (::emulation::current->thread)
#define blockIdx (::emulation::block)
#define blockDim (::emulation::block_size)
#define gridDim (::emulation::grid_size)

inline void __syncthreads() { emulation::wait(emulation::block_barrier); }
inline void __syncwarp(unsigned = 0) { emulation::wait(emulation::warp_barriers[emulation::thread_index() / 32]); }
inline void __threadfence() {}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) { return emulation::shuffle(value, (emulation::thread_index() % 32) ^ mask); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) { return emulation::shuffle(value, lane); }
template <typename T>
T atomicAdd(T* p, T value) { const T before = *p; *p += value; return before; }
template <typename T>
T __ldg(const T* p) { return *p; }
template <typename T>
T __ldcg(const T* p) { return *p; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }

using __nv_bfloat16 = torch::headeronly::BFloat16;
using __half = torch::headeronly::Half;
inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __half2float(__half x) { return float(x); }
inline __half __float2half_rn(float x) { return __half(x); }

// A device with a few multiprocessors, so that small inputs still make persistent blocks loop.
constexpr int cudaDevAttrMultiProcessorCount = 0, cudaDevAttrMaxSharedMemoryPerBlockOptin = 1;
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, int attribute, int) {
  return *value = attribute == cudaDevAttrMultiProcessorCount ? 11 : int(emulation::kSharedBytes), 0;
}
template <typename Kernel>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) { return *blocks = 1, 0; }
template <typename Kernel>
int cudaFuncSetAttribute(Kernel, int, int) { return 0; }
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
#undef STD_CUDA_CHECK
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_CHECK(expression) static_cast<void>(expression)
#define STD_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)

namespace emulation {
inline int current_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
}  // namespace emulation
