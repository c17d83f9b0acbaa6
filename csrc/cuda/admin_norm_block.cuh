// What the kernels of admin_norm_forward.cu and admin_norm_backward.cu share: the arguments of both passes, sums over
// the threads that hold a row, the arithmetic of one 16-byte pack, and how rows are spread over blocks. Mathematics:
// repdeg_fast/reference/admin_norm.py.
#pragma once

#include <optional>
#include <utility>

#include "../philox.h"
#include "row_ring.cuh"

namespace repdeg_fast {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr int kMaxThreads = 512;      // of a block, where a thread has one pack of each row: 128 registers each
constexpr int kLongPacks = 4;         // packs a thread in the longest rows that are held,
constexpr int kLongThreads = 256;     // by this many threads of 255 registers
constexpr int kGroupedThreads = 256;  // groups of fewer threads share a block of about this many, and its sums

// What both passes take; null where absent. Matrices: rows of unit stride; parameters: d values, 16-byte aligned.
template <typename T>
struct Block {
  const T *grad_y, *y, *x, *branch;
  const float *omega, *weight, *bias, *branch_bias, *mean, *rstd;
  const int64_t* seed;
  int64_t n, x_stride, branch_stride;
  int d;
  float dropout, scale;
  bool center;
};

// The threads that hold one row (or one block of columns of it) together.
struct Group {
  int threads, index, lane;
  __device__ explicit Group(int threads)
      : threads(threads), index(threadIdx.x / threads), lane(threadIdx.x % threads) {}
  __device__ int count() const { return blockDim.x / threads; }
};

// Σ of two values over a group, the same in all its threads. Two scratch areas in turn need only one barrier a call.
struct GroupSum {
  float2* scratch;  // 2 × warps
  int turn = 0;

  __device__ float2 operator()(float2 value, const Group& group) {
    value.x = warp_sum(value.x);
    value.y = warp_sum(value.y);
    if (group.threads == 32) return __syncwarp(), value;
    float2* area = scratch + turn * (kMaxThreads / 32);
    turn ^= 1;
    if (threadIdx.x % 32 == 0) area[threadIdx.x / 32] = value;
    __syncthreads();
    const int warps = group.threads / 32;
    value = float2{0, 0};
    for (int w = 0; w < warps; ++w) {
      value.x += area[group.index * warps + w].x;
      value.y += area[group.index * warps + w].y;
    }
    return value;
  }
};

// A pack's worth of fp32 values: a parameter's, or sums.
template <int kSize>
struct Floats {
  float value[kSize];

  __device__ static Floats all(float x) {
    Floats f;
    for (int j = 0; j < kSize; ++j) f.value[j] = x;
    return f;
  }
  __device__ static Floats load(const float* p) {
    Floats f;
    for (int j = 0; j < kSize; j += 4) {
      const float4 v = *reinterpret_cast<const float4*>(p + j);
      f.value[j] = v.x, f.value[j + 1] = v.y, f.value[j + 2] = v.z, f.value[j + 3] = v.w;
    }
    return f;
  }
  __device__ static Floats parameter(const float* p, int column, float absent) {
    return p ? load(p + column) : all(absent);
  }
  __device__ void store(float* p) const {
    for (int j = 0; j < kSize; j += 4)
      *reinterpret_cast<float4*>(p + j) = float4{value[j], value[j + 1], value[j + 2], value[j + 3]};
  }
};

struct Moments {
  float mean, rstd;
};

// Of a row, around a first mean, which has lost digits where the row is far from zero: the mean of what is left around it
// has them.
struct Deviations {
  float origin, sum = 0, squares = 0;

  template <int kSize>
  __device__ void add(const Floats<kSize>& z) {
    for (int j = 0; j < kSize; ++j) {
      const float deviation = z.value[j] - origin;
      sum += deviation;
      squares += deviation * deviation;
    }
  }
  // From those of all threads of the group; not around a mean if it is not centred.
  template <typename T>
  __device__ Moments moments(const Block<T>& b, float eps, GroupSum& group_sum, const Group& group) const {
    const float2 total = group_sum({sum, squares}, group);
    const float shift = b.center ? total.x / b.d : 0, variance = total.y / b.d - shift * shift;
    return {origin + shift, 1 / sqrtf((variance < 0 ? 0 : variance) + eps)};
  }
};

// Which values of a pack dropout keeps, a bit each; all of them without dropout.
template <typename T>
__device__ uint32_t kept_bits(const Block<T>& b, int64_t row, int column) {
  if (!b.seed) return ~0u;
  uint32_t bits = 0;
#pragma unroll 1  // one generator's registers at a time
  for (int j = 0; j < Pack<T>::size; j += 4) {
    const PhiloxWords words = philox(uint64_t(*b.seed), uint32_t(column + j) / 4, uint32_t(row), kDropoutStream);
#pragma unroll
    for (int l = 0; l < 4; ++l) bits |= uint32_t(philox_uniform(words.lane[l]) >= b.dropout) << (j + l);
  }
  return bits;
}

__device__ inline float keep(uint32_t bits, int j, float scale) { return bits >> j & 1 ? scale : 0.f; }

// z = x ⊙ ω + k ⊙ (f + b) of one pack.
template <typename T>
__device__ Floats<Pack<T>::size> residual_sum(const Block<T>& b, const Pack<T>& x, const Pack<T>& f, uint32_t bits,
                                              int column) {
  constexpr int S = Pack<T>::size;
  const auto omega = Floats<S>::parameter(b.omega, column, 1), bias = Floats<S>::parameter(b.branch_bias, column, 0);
  Floats<S> z;
  for (int j = 0; j < S; ++j) {
    z.value[j] = to_float(x.value[j]) * omega.value[j] +
                 (to_float(f.value[j]) + bias.value[j]) * keep(bits, j, b.scale);
  }
  return z;
}

// 1/γ; 0 where γ is 0 and y says nothing of n.
template <int kSize>
__device__ Floats<kSize> inverse_of(Floats<kSize> weight) {
  for (int j = 0; j < kSize; ++j) weight.value[j] = weight.value[j] == 0 ? 0 : __fdividef(1, weight.value[j]);
  return weight;
}

// n of one pack: (y − β)/γ, or from the inputs (`first` is y or x, `second` the branch).
template <bool kFromOutput, typename T>
__device__ Floats<Pack<T>::size> normalized(const Block<T>& b, const Pack<T>& first, const Pack<T>& second,
                                            uint32_t bits, const Floats<Pack<T>::size>& inverse_weight, float mean,
                                            float rstd, int column) {
  constexpr int S = Pack<T>::size;
  Floats<S> n;
  if constexpr (kFromOutput) {
    const auto bias = Floats<S>::parameter(b.bias, column, 0);
    for (int j = 0; j < S; ++j) n.value[j] = (to_float(first.value[j]) - bias.value[j]) * inverse_weight.value[j];
  } else {
    n = residual_sum(b, first, second, bits, column);
    for (int j = 0; j < S; ++j) n.value[j] = (n.value[j] - mean) * rstd;
  }
  return n;
}

template <typename T>
__device__ Pack<T> affine(const Block<T>& b, const Floats<Pack<T>::size>& z, const Moments& moments, int column) {
  constexpr int S = Pack<T>::size;
  const auto weight = Floats<S>::parameter(b.weight, column, 1), bias = Floats<S>::parameter(b.bias, column, 0);
  Pack<T> y;
  for (int j = 0; j < S; ++j)
    y.value[j] = from_float<T>((z.value[j] - moments.mean) * moments.rstd * weight.value[j] + bias.value[j]);
  return y;
}

// The ring that a block's rows, or parts of them, come through, a group's at a time.
template <typename T, int kStreams>
__device__ RowRing<T, kStreams> row_ring(void* shared, int columns, int stages, const Group& group) {
  const int row_bytes = columns * sizeof(T);
  return {shared, row_bytes, stages, group.index, group.count(), group.lane, group.threads,
          row_bytes >= kLeastBulkBytes};
}

// How many threads hold a row, and how many of these groups make a block.
struct Layout {
  int threads, groups;
  int block() const { return threads * groups; }
  static Layout of_columns(int64_t columns_a_thread, int64_t d) {
    const int threads = int((d + columns_a_thread - 1) / columns_a_thread + 31) / 32 * 32;
    return {threads, threads < kGroupedThreads ? kGroupedThreads / threads : 1};
  }
};

// f(number of packs a thread) for a row that fits into a block's registers; false for a longer one.
template <typename T, typename F>
bool dispatch_packs(int64_t d, F&& f) {
  if (d <= kMaxThreads * Pack<T>::size) return f(std::integral_constant<int, 1>{}), true;
  if (d <= kLongThreads * kLongPacks * Pack<T>::size) return f(std::integral_constant<int, kLongPacks>{}), true;
  return false;
}

template <typename Kernel>
int64_t resident_blocks(Kernel kernel, const Layout& layout, size_t shared, int64_t rows) {
  const int64_t blocks = persistent_blocks(kernel, layout.block(), (rows + layout.groups - 1) / layout.groups, shared);
  return blocks > 0 ? blocks : 1;
}

template <typename T>
const T* pointer(const MaybeTensor& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// Parameters are read 16 bytes at a time; a view into a flat buffer may start anywhere.
MaybeTensor aligned(const MaybeTensor& parameter) {
  const bool misaligned = parameter && reinterpret_cast<uintptr_t>(parameter->data_ptr()) % sizeof(uint4);
  return misaligned ? MaybeTensor(torch::stable::clone(*parameter)) : parameter;
}

struct Parameters {
  MaybeTensor omega, weight, bias, branch_bias;
  Parameters(const MaybeTensor& omega, const MaybeTensor& weight, const MaybeTensor& bias,
             const MaybeTensor& branch_bias)
      : omega(aligned(omega)), weight(aligned(weight)), bias(aligned(bias)), branch_bias(aligned(branch_bias)) {}
};

template <typename T>
Block<T> block_of(const MaybeTensor& x, const MaybeTensor& branch, const Parameters& parameters,
                  const MaybeTensor& seed, double dropout, bool center) {
  Block<T> b{};
  b.x = pointer<T>(x), b.branch = pointer<T>(branch);
  b.omega = pointer<float>(parameters.omega), b.weight = pointer<float>(parameters.weight);
  b.bias = pointer<float>(parameters.bias), b.branch_bias = pointer<float>(parameters.branch_bias);
  b.seed = pointer<int64_t>(seed);
  b.x_stride = x ? x->stride(0) : 0, b.branch_stride = branch ? branch->stride(0) : 0;
  b.dropout = float(dropout), b.scale = float(1 / (1 - dropout));
  b.center = center;
  return b;
}

}  // namespace
}  // namespace repdeg_fast
