// CosReg in CUDA. Mathematics: repdeg_fast/reference/cosreg.py.
//
// Bandwidth-bound: forward must read W once, backward must read W and write its gradient once. A row waits in a ring in
// shared memory, from where its group of threads (a warp, or a block for long rows) reads it for both of its uses;
// registers hold the group's share of the column sum, over all rows that the group takes in a persistent grid. Two
// launches forward, one backward; no float atomics: the same bits every time.
#include <optional>

#include "row_ring.cuh"

namespace repdeg_fast {
namespace {

constexpr int kReduceColumns = 32, kReduceLanes = 8, kReduceSplits = 8;

// How rows of up to kThreads * kValues values are spread: `kThreads` threads of a block of `kBlock` hold one together.
template <int kThreads_, int kBlock_, int kValues_>
struct Layout {
  static constexpr int kThreads = kThreads_, kBlock = kBlock_, kValues = kValues_, kGroups = kBlock / kThreads;
  static constexpr int kWarps = kBlock / 32;
  static constexpr bool kBulk = kValues > 8;  // a warp's rows of so few values are short
};

template <typename L>
__device__ void group_barrier() {
  if constexpr (L::kThreads == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The same sum in all threads of a group. Two areas of scratch in turn: one barrier a call.
template <typename L>
struct RowSum {
  float* scratch;  // 2 × kWarps
  int turn = 0;

  __device__ float operator()(float x) {
    x = warp_sum(x);
    if constexpr (L::kThreads == 32) {
      __syncwarp();  // or what was read of the row would be kept in registers
      return x;
    } else {
      float* area = scratch + turn * L::kWarps;
      turn ^= 1;
      if (threadIdx.x % 32 == 0) area[threadIdx.x / 32] = x;
      __syncthreads();
      x = 0;
      for (int w = 0; w < L::kWarps; ++w) x += area[w];
      return x;
    }
  }
};

// f(column of the first value, index of the first value in this thread, values) for each pack of a row that a thread
// takes: lane, lane + kThreads, …
template <typename L, typename T, typename F>
__device__ void each_pack(const T* row, int lane, int d, F&& f) {
#pragma unroll
  for (int k = 0; k < L::kValues / Pack<T>::size; ++k) {
    const int column = (k * L::kThreads + lane) * Pack<T>::size;
    if (column < d) f(column, k * Pack<T>::size, Pack<T>::load(row + column));
  }
}

// Σ (factor·x)² over a row.
template <typename L, typename T>
__device__ float row_square(const T* row, float factor, int lane, int d, RowSum<L>& row_sum) {
  float squared = 0;
  each_pack<L>(row, lane, d, [&](int, int, const Pack<T>& pack) {
    for (int j = 0; j < Pack<T>::size; ++j) {
      const float value = to_float(pack.value[j]) * factor;
      squared += value * value;
    }
  });
  return row_sum(squared);
}

// ‖x‖; NaN where its square overflows, which must not look like a zero row. Squares of tiny values would be lost: those
// rows are looked at again, enlarged.
template <typename L, typename T>
__device__ float row_norm(const T* row, int lane, int d, RowSum<L>& row_sum) {
  constexpr float kEnlarge = 0x1p64f, kTiny = 0x1p-96f;
  const float squared = row_square<L>(row, 1.f, lane, d, row_sum);
  if (isinf(squared)) return NAN;
  if (!(squared < kTiny)) return sqrtf(squared);
  return sqrtf(row_square<L>(row, kEnlarge, lane, d, row_sum)) / kEnlarge;
}

template <typename L, typename T>
__global__ void __launch_bounds__(L::kBlock, 1)
    forward_kernel(const T* weight, const float* row_weight, float* inverse_norm, float* partial_sum,
                   float* partial_self, float* partial_total, int* counters, int number_of_counters, int64_t n, int d,
                   int64_t row_stride, float eps, int stages) {
  extern __shared__ uint4 shared[];
  __shared__ float scratch[2 * L::kWarps];
  const int group = threadIdx.x / L::kThreads, lane = threadIdx.x % L::kThreads;
  float column_sum[L::kValues] = {};
  float self_sum = 0, total = 0;
  const int64_t first_row = int64_t(blockIdx.x) * L::kGroups + group, step = int64_t(gridDim.x) * L::kGroups;
  RowSum<L> row_sum{scratch};
  RowRing<T, 1> ring(shared, d * sizeof(T), stages, group, L::kGroups, lane, L::kThreads, L::kBulk);
  const auto fetch = [&](int64_t row) { ring.fill(row < n, [&](int) { return weight + row * row_stride; }); };
  ring.begin(stages, [&](int s) { fetch(first_row + s * step); });
  for (int64_t row = first_row; row < n; row += step) {
    ring.wait(true);
    const T* x = ring.row(0);
    const float norm = row_norm<L>(x, lane, d, row_sum);
    // fmaxf would drop a NaN
    const float inverse = norm == 0 ? 0 : 1 / (norm < eps ? eps : norm);
    // ‖ŵ‖ is 1 by definition, and less only where eps is what divides
    const float unit = norm == 0 ? 0 : (inverse * eps < 1 ? 1 : norm * inverse);
    float p = row_weight ? row_weight[row] : 1;
    if (p < 0) p = NAN;
    const float coefficient = p * inverse;
    each_pack<L>(x, lane, d, [&](int, int first, const Pack<T>& pack) {
      for (int j = 0; j < Pack<T>::size; ++j) column_sum[first + j] += coefficient * to_float(pack.value[j]);
    });
    self_sum += p * p * unit * unit;
    total += p;
    if (lane == 0) inverse_norm[row] = inverse;
    group_barrier<L>();  // all have read the row: its stage is free
    fetch(row + stages * step);
    ring.next();
  }

  __syncthreads();  // nobody reads the ring any more
  float* sums = reinterpret_cast<float*>(shared);
  float* out = partial_sum + int64_t(blockIdx.x) * d;
  for (int g = 0; g < L::kGroups; ++g) {  // one group after the other: a fixed order
    if (group == g) {
#pragma unroll
      for (int i = 0; i < L::kValues; ++i) {
        const int column = (i / Pack<T>::size * L::kThreads + lane) * Pack<T>::size + i % Pack<T>::size;
        if (column >= d) break;
        const float value = column_sum[i] + (g > 0 ? sums[column] : 0);
        (g + 1 < L::kGroups ? sums : out)[column] = value;
      }
    }
    __syncthreads();
  }
  const float block_self = block_sum(lane == 0 ? self_sum : 0.f, scratch);
  const float block_total = block_sum(lane == 0 ? total : 0.f, scratch);
  if (threadIdx.x == 0) {
    partial_self[blockIdx.x] = block_self;
    partial_total[blockIdx.x] = block_total;
  }
  if (blockIdx.x == 0)  // for the next launch
    for (int i = threadIdx.x; i < number_of_counters; i += L::kBlock) counters[i] = 0;
}

__device__ double ordered_sum(const float* values, int count, double* scratch) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += values[i];
  return block_sum(sum, scratch);
}

// Whether this block is the last of `count` to come here with what it wrote; then it sees what the others wrote.
__device__ bool is_last(int* counter, int count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1) == count - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// Column sums over the blocks of the first launch, the rows of a group of columns split over blockIdx.y. The last block of
// a group to finish (an integer counter) adds up its splits, the last of all adds up the groups' squares, both in a fixed
// order, so that R needs no third launch and does not depend on who was last.
__global__ void __launch_bounds__(kReduceColumns * kReduceLanes)
    reduce_kernel(const float* partial_sum, const float* partial_self, const float* partial_total, double* split_sum,
                  double* group_square, int* counters, float* column_sum, float* value, float* total_weight,
                  int partials, int d) {
  __shared__ double lanes[kReduceLanes][kReduceColumns];
  __shared__ double scratch[kReduceLanes];
  const int x = threadIdx.x % kReduceColumns, y = threadIdx.x / kReduceColumns;
  const int column = blockIdx.x * kReduceColumns + x, columns = gridDim.x * kReduceColumns, splits = gridDim.y;
  double sum = 0;
  if (column < d)
    for (int r = blockIdx.y * kReduceLanes + y; r < partials; r += splits * kReduceLanes)
      sum += partial_sum[int64_t(r) * d + column];
  lanes[y][x] = sum;
  __syncthreads();
  if (y == 0) {
    for (int k = 1; k < kReduceLanes; ++k) sum += lanes[k][x];
    split_sum[int64_t(blockIdx.y) * columns + column] = sum;
  }
  if (!is_last(counters + blockIdx.x, splits)) return;
  if (y == 0) {
    sum = 0;
    for (int k = 0; k < splits; ++k) sum += __ldcg(split_sum + int64_t(k) * columns + column);
    if (column < d) column_sum[column] = float(sum);
    const double square = warp_sum(sum * sum);
    if (x == 0) group_square[blockIdx.x] = square;
  }
  if (!is_last(counters + gridDim.x, gridDim.x)) return;
  double square = 0;
  for (int i = threadIdx.x; i < int(gridDim.x); i += blockDim.x) square += __ldcg(group_square + i);
  square = block_sum(square, scratch);
  const double self_sum = ordered_sum(partial_self, partials, scratch);
  const double total = ordered_sum(partial_total, partials, scratch);
  if (threadIdx.x == 0) {
    *value = float((square - self_sum) / (total * total));
    *total_weight = float(total);
  }
}

// grad = a·(s − b·x) a row, with a = 2 g p / (P² ‖w‖) and b = (s·ŵ) / ‖w‖; s stays in registers throughout.
template <typename L, typename T, bool kAccumulate>
__global__ void __launch_bounds__(L::kBlock, 1)
    backward_kernel(T* grad_weight, const float* grad_value, const T* weight, const float* row_weight,
                    const float* column_sum, const float* inverse_norm, const float* total_weight, int64_t n, int d,
                    int64_t row_stride, int64_t grad_row_stride, float largest_inverse, int stages) {
  extern __shared__ uint4 shared[];
  __shared__ float scratch[2 * L::kWarps];
  const int group = threadIdx.x / L::kThreads, lane = threadIdx.x % L::kThreads;
  const float total = total_weight ? *total_weight : float(n);
  const float scale = 2 * *grad_value / (total * total);
  const int64_t first_row = int64_t(blockIdx.x) * L::kGroups + group, step = int64_t(gridDim.x) * L::kGroups;
  RowSum<L> row_sum{scratch};
  RowRing<T, kAccumulate ? 2 : 1> ring(shared, d * sizeof(T), stages, group, L::kGroups, lane, L::kThreads, L::kBulk);
  const auto fetch = [&](int64_t row) {
    ring.fill(row < n, [&](int stream) -> const T* {
      return stream == 0 ? weight + row * row_stride : grad_weight + row * grad_row_stride;
    });
  };
  ring.begin(stages, [&](int s) { fetch(first_row + s * step); });
  float s[L::kValues] = {};
#pragma unroll
  for (int i = 0; i < L::kValues; ++i) {
    const int column = (i / Pack<T>::size * L::kThreads + lane) * Pack<T>::size + i % Pack<T>::size;
    if (column < d) s[i] = column_sum[column];
  }
  for (int64_t row = first_row; row < n; row += step) {
    ring.wait(true);
    const T* x = ring.row(0);
    float product = 0;
    each_pack<L>(x, lane, d, [&](int, int first, const Pack<T>& pack) {
      for (int j = 0; j < Pack<T>::size; ++j) product += s[first + j] * to_float(pack.value[j]);
    });
    product = row_sum(product);
    const float inverse = inverse_norm[row], p = row_weight ? row_weight[row] : 1;
    // where eps is what divides, ŵ is linear in w and nothing is projected out
    const float along = inverse >= largest_inverse ? p : product * inverse;
    const float a = scale * p * inverse, b = along * inverse;
    T* out = grad_weight + row * grad_row_stride;
    each_pack<L>(x, lane, d, [&](int column, int first, const Pack<T>& pack) {
      Pack<T> gradient = kAccumulate ? Pack<T>::load(ring.row(kAccumulate) + column) : Pack<T>{};
      for (int j = 0; j < Pack<T>::size; ++j) {
        const float before = kAccumulate ? to_float(gradient.value[j]) : 0;
        gradient.value[j] = from_float<T>(before + a * (s[first + j] - b * to_float(pack.value[j])));
      }
      gradient.store(out + column);
    });
    group_barrier<L>();
    fetch(row + stages * step);
    ring.next();
  }
}

// The narrowest layout that holds a row of d values. Registers hold one fp32 value a column, and 16 warps have room for
// 72 a thread.
template <typename F>
void dispatch_layout(int64_t d, F&& f) {
  if (d <= 32 * 8) return f(Layout<32, 128, 8>{});
  if (d <= 32 * 24) return f(Layout<32, 128, 24>{});
  if (d <= 32 * 32) return f(Layout<32, 128, 32>{});
  if (d <= 32 * 72) return f(Layout<32, 128, 72>{});
  if (d <= 128 * 32) return f(Layout<128, 128, 32>{});
  if (d <= 256 * 32) return f(Layout<256, 256, 32>{});
  STD_TORCH_CHECK(d <= 512 * 24, "cosreg: rows of at most 12,288 values, got ", d);
  return f(Layout<512, 512, 24>{});
}

const float* optional_pointer(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->data_ptr()) : nullptr;
}

float* pointer(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> cosreg_forward(const Tensor& weight, const std::optional<Tensor>& row_weight,
                                                          double eps) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const cudaStream_t stream = current_stream(weight);
  const int64_t n = weight.size(0), d = weight.size(1);
  const auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType type = ScalarType::Float) {
    return torch::stable::new_empty(weight, size, type);
  };
  Tensor value = empty({}), column_sum = empty({d}), inverse = empty({n}), total = empty({});
  dispatch_floating(weight.scalar_type(), "cosreg_forward", [&](auto type) {
    using T = decltype(type);
    dispatch_layout(d, [&](auto layout) {
      using L = decltype(layout);
      const auto [stages, shared] = ring_size<T, 1>(L::kGroups, d);
      const auto kernel = forward_kernel<L, T>;
      const int64_t blocks = persistent_blocks(kernel, L::kBlock, (n + L::kGroups - 1) / L::kGroups, shared);
      const int64_t reduce_blocks = (d + kReduceColumns - 1) / kReduceColumns;
      const Tensor partial_sum = empty({blocks, d}), partials = empty({2, blocks});
      // the last block of a group of columns adds up its splits, and the last group all of them
      const int64_t sums = (kReduceSplits * kReduceColumns + 1) * reduce_blocks, number_of_counters = reduce_blocks + 1;
      const Tensor reduced = empty({sums}, ScalarType::Double), counter = empty({number_of_counters}, ScalarType::Int);
      double* split_sum = static_cast<double*>(reduced.data_ptr());
      double* group_square = split_sum + kReduceSplits * kReduceColumns * reduce_blocks;
      int* counters = static_cast<int*>(counter.data_ptr());
      float* partial_self = pointer(partials);
      float* partial_total = partial_self + blocks;
      kernel<<<blocks, L::kBlock, shared, stream>>>(
          static_cast<const T*>(weight.data_ptr()), optional_pointer(row_weight), pointer(inverse),
          pointer(partial_sum), partial_self, partial_total, counters, int(number_of_counters), n, int(d),
          weight.stride(0), float(eps), stages);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      const dim3 reduce_grid(reduce_blocks, kReduceSplits);
      reduce_kernel<<<reduce_grid, kReduceColumns * kReduceLanes, 0, stream>>>(
          pointer(partial_sum), partial_self, partial_total, split_sum, group_square, counters,
          pointer(column_sum), pointer(value), pointer(total), int(blocks), int(d));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {value, column_sum, inverse, total};
}

void cosreg_backward(Tensor grad_weight, const Tensor& grad_value, const Tensor& weight,
                     const std::optional<Tensor>& row_weight, const Tensor& column_sum, const Tensor& inverse_norm,
                     const std::optional<Tensor>& total_weight, double eps, bool accumulate) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const int64_t n = weight.size(0), d = weight.size(1);
  dispatch_floating(weight.scalar_type(), "cosreg_backward", [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto accumulated) {
      dispatch_layout(d, [&](auto layout) {
        using L = decltype(layout);
        const auto [stages, shared] = ring_size<T, accumulated.value ? 2 : 1>(L::kGroups, d);
        const auto kernel = backward_kernel<L, T, accumulated.value>;
        const int64_t blocks = persistent_blocks(kernel, L::kBlock, (n + L::kGroups - 1) / L::kGroups, shared);
        kernel<<<blocks, L::kBlock, shared, current_stream(weight)>>>(
            static_cast<T*>(grad_weight.data_ptr()), pointer(grad_value), static_cast<const T*>(weight.data_ptr()),
            optional_pointer(row_weight), pointer(column_sum), pointer(inverse_norm), optional_pointer(total_weight), n,
            int(d), weight.stride(0), grad_weight.stride(0), float(1 / eps), stages);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
    };
    if (accumulate) {
      launch(std::true_type{});
    } else {
      launch(std::false_type{});
    }
  });
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CUDA, m) {
  m.impl("cosreg_forward", TORCH_BOX(&repdeg_fast::cosreg_forward));
  m.impl("cosreg_backward", TORCH_BOX(&repdeg_fast::cosreg_backward));
}
