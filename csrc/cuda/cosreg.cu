// CosReg in CUDA. Mathematics: repdeg_fast/reference/cosreg.py.
//
// Bandwidth-bound: forward must read W once, backward must read W and write its gradient once. A row is held in the
// registers of its group of threads (a warp, or a block for long rows) between the two uses it is read for, and so is
// the group's share of the column sum, over all rows that the group takes in a persistent grid. The next row is already
// on its way while one is summed. Two launches forward, one backward; no float atomics: the same bits every time.
#include <optional>

#include "rows.cuh"

namespace repdeg_fast {
namespace {

constexpr int kReduceColumns = 32, kReduceLanes = 8, kReduceSplits = 8;

// How rows of up to kThreads * kValues values are spread: `kThreads` threads of a block of `kBlock` hold `kRows` of them
// together. Several share the barriers that a sum over a block takes, and are on their way at once.
template <int kThreads_, int kBlock_, int kValues_, int kRows_ = 1>
struct Layout {
  static constexpr int kThreads = kThreads_, kBlock = kBlock_, kValues = kValues_, kGroups = kBlock / kThreads;
  static constexpr int kRows = kRows_, kWarps = kBlock / 32;
};

// One value a row.
template <typename L>
struct Values {
  float of[L::kRows];
};

// The same sums in all threads of a group. `scratch`: kRows values a warp.
template <typename L>
__device__ Values<L> row_sums(Values<L> x, float* scratch) {
  for (int r = 0; r < L::kRows; ++r) x.of[r] = warp_sum(x.of[r]);
  if constexpr (L::kThreads > 32) {
    const int warp = threadIdx.x / 32;
    __syncthreads();  // scratch may still be read from the call before
    if (threadIdx.x % 32 == 0)
      for (int r = 0; r < L::kRows; ++r) scratch[r * L::kWarps + warp] = x.of[r];
    __syncthreads();
    for (int r = 0; r < L::kRows; ++r) {
      x.of[r] = 0;
      for (int w = 0; w < L::kWarps; ++w) x.of[r] += scratch[r * L::kWarps + w];
    }
  }
  return x;
}

// The part of a row that one thread holds: packs lane, lane + kThreads, …; beyond d: zeros.
template <typename L, typename T>
struct RowPart {
  static constexpr int kPacks = L::kValues / Pack<T>::size;
  Pack<T> pack[kPacks];

  __device__ void load(const T* row, int lane, int d) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int column = (k * L::kThreads + lane) * Pack<T>::size;
      pack[k] = column < d ? Pack<T>::load(row + column) : Pack<T>{};
    }
  }

  // f(column of the first value, index of the first value in this thread, pack) for each pack that lies in the row
  template <typename F>
  __device__ void each(int lane, int d, F&& f) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int column = (k * L::kThreads + lane) * Pack<T>::size;
      if (column < d) f(column, k * Pack<T>::size, pack[k]);
    }
  }
};

// The rows that a group takes in one step: first, first + step, …; those from n on are zeros.
template <typename L, typename T>
struct Rows {
  RowPart<L, T> part[L::kRows];

  __device__ void load(const T* matrix, int64_t row_stride, int64_t first, int64_t step, int64_t n, int lane, int d) {
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      const int64_t row = first + r * step;
      part[r].load(matrix + row * row_stride, lane, row < n ? d : 0);
    }
  }
};

// Σ (factor·x)² over each row.
template <typename L, typename T>
__device__ Values<L> row_squares(Rows<L, T>& x, float factor, int lane, int d, float* scratch) {
  Values<L> squared{};
#pragma unroll
  for (int r = 0; r < L::kRows; ++r) {
    x.part[r].each(lane, d, [&](int, int, const Pack<T>& pack) {
      for (int j = 0; j < Pack<T>::size; ++j) {
        const float value = to_float(pack.value[j]) * factor;
        squared.of[r] += value * value;
      }
    });
  }
  return row_sums<L>(squared, scratch);
}

// ‖x‖; NaN where its square overflows, which must not look like a zero row. Squares of tiny values would be lost: those
// rows are looked at again, enlarged.
template <typename L, typename T>
__device__ Values<L> row_norms(Rows<L, T>& x, int lane, int d, float* scratch) {
  constexpr float kEnlarge = 0x1p64f, kTiny = 0x1p-96f;
  const Values<L> squared = row_squares(x, 1.f, lane, d, scratch);
  Values<L> norm;
  bool tiny = false;
  for (int r = 0; r < L::kRows; ++r) {
    tiny |= squared.of[r] < kTiny;
    norm.of[r] = isinf(squared.of[r]) ? NAN : sqrtf(squared.of[r]);
  }
  if (!tiny) return norm;
  const Values<L> enlarged = row_squares(x, kEnlarge, lane, d, scratch);
  for (int r = 0; r < L::kRows; ++r)
    if (squared.of[r] < kTiny) norm.of[r] = sqrtf(enlarged.of[r]) / kEnlarge;
  return norm;
}

template <typename L, typename T>
__global__ void __launch_bounds__(L::kBlock)
    forward_kernel(const T* weight, const float* row_weight, float* inverse_norm, float* partial_sum,
                   float* partial_self, float* partial_total, int* counters, int number_of_counters, int64_t n, int d,
                   int64_t row_stride, float eps) {
  extern __shared__ float shared[];  // kGroups > 1: d values, to add the groups' column sums
  __shared__ float scratch[L::kRows * L::kWarps];
  const int group = threadIdx.x / L::kThreads, lane = threadIdx.x % L::kThreads;
  float column_sum[L::kValues] = {};
  float self_sum = 0, total = 0;
  const int64_t first_row = int64_t(blockIdx.x) * L::kGroups + group, step = int64_t(gridDim.x) * L::kGroups;
  Rows<L, T> x, next;
  next.load(weight, row_stride, first_row, step, n, lane, d);
  for (int64_t first = first_row; first < n; first += step * L::kRows) {
    x = next;
    next.load(weight, row_stride, first + step * L::kRows, step, n, lane, d);
    const Values<L> norms = row_norms<L>(x, lane, d, scratch);
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      const int64_t row = first + r * step;
      if (row >= n) continue;
      const float norm = norms.of[r];
      // fmaxf would drop a NaN
      const float inverse = norm == 0 ? 0 : 1 / (norm < eps ? eps : norm);
      // ‖ŵ‖ is 1 by definition, and less only where eps is what divides
      const float unit = norm == 0 ? 0 : (inverse * eps < 1 ? 1 : norm * inverse);
      float p = row_weight ? row_weight[row] : 1;
      if (p < 0) p = NAN;
      const float coefficient = p * inverse;
      x.part[r].each(lane, d, [&](int, int first, const Pack<T>& pack) {
        for (int j = 0; j < Pack<T>::size; ++j) column_sum[first + j] += coefficient * to_float(pack.value[j]);
      });
      self_sum += p * p * unit * unit;
      total += p;
      if (lane == 0) inverse_norm[row] = inverse;
    }
  }

  float* out = partial_sum + int64_t(blockIdx.x) * d;
  for (int g = 0; g < L::kGroups; ++g) {  // one group after the other: a fixed order
    if (group == g) {
      x.part[0].each(lane, d, [&](int column, int first, const Pack<T>&) {
        for (int j = 0; j < Pack<T>::size; ++j) {
          const float value = column_sum[first + j] + (g > 0 ? shared[column + j] : 0);
          if (g + 1 < L::kGroups) {
            shared[column + j] = value;
          } else {
            out[column + j] = value;
          }
        }
      });
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
                    int64_t row_stride, int64_t grad_row_stride, float largest_inverse) {
  __shared__ float scratch[L::kRows * L::kWarps];
  const int group = threadIdx.x / L::kThreads, lane = threadIdx.x % L::kThreads;
  const float total = total_weight ? *total_weight : float(n);
  const float scale = 2 * *grad_value / (total * total);
  float s[L::kValues] = {};
  const int64_t first_row = int64_t(blockIdx.x) * L::kGroups + group, step = int64_t(gridDim.x) * L::kGroups;
  Rows<L, T> x, next, gradient;
  x.part[0].each(lane, d, [&](int column, int first, const Pack<T>&) {
    for (int j = 0; j < Pack<T>::size; ++j) s[first + j] = column_sum[column + j];
  });
  next.load(weight, row_stride, first_row, step, n, lane, d);
  for (int64_t first = first_row; first < n; first += step * L::kRows) {
    x = next;
    if (kAccumulate) gradient.load(grad_weight, grad_row_stride, first, step, n, lane, d);
    next.load(weight, row_stride, first + step * L::kRows, step, n, lane, d);
    Values<L> product{};
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      x.part[r].each(lane, d, [&](int, int first, const Pack<T>& pack) {
        for (int j = 0; j < Pack<T>::size; ++j) product.of[r] += s[first + j] * to_float(pack.value[j]);
      });
    }
    product = row_sums<L>(product, scratch);
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      const int64_t row = first + r * step;
      if (row >= n) continue;
      const float inverse = inverse_norm[row], p = row_weight ? row_weight[row] : 1;
      // where eps is what divides, ŵ is linear in w and nothing is projected out
      const float along = inverse >= largest_inverse ? p : product.of[r] * inverse;
      const float a = scale * p * inverse, b = along * inverse;
      T* out = grad_weight + row * grad_row_stride;
      gradient.part[r].each(lane, d, [&](int column, int first, Pack<T>& pack) {
        const Pack<T> row_values = x.part[r].pack[first / Pack<T>::size];
        for (int j = 0; j < Pack<T>::size; ++j) {
          const float before = kAccumulate ? to_float(pack.value[j]) : 0;
          pack.value[j] = from_float<T>(before + a * (s[first + j] - b * to_float(row_values.value[j])));
        }
        pack.store(out + column);
      });
    }
  }
}

// The narrowest layout that holds a row of d values: at most 32 values a thread, so that several blocks fit on a
// multiprocessor and nothing spills.
template <typename F>
void dispatch_layout(int64_t d, F&& f) {
  if (d <= 32 * 8) return f(Layout<32, 128, 8>{});
  if (d <= 32 * 24) return f(Layout<32, 128, 24>{});
  if (d <= 32 * 32) return f(Layout<32, 128, 32>{});
  if (d <= 128 * 24) return f(Layout<128, 128, 24, 2>{});
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
      const auto kernel = forward_kernel<L, T>;
      const int64_t blocks = persistent_blocks(kernel, L::kBlock, (n + L::kGroups - 1) / L::kGroups);
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
      const size_t shared = L::kGroups > 1 ? d * sizeof(float) : 0;
      kernel<<<blocks, L::kBlock, shared, stream>>>(
          static_cast<const T*>(weight.data_ptr()), optional_pointer(row_weight), pointer(inverse),
          pointer(partial_sum), partial_self, partial_total, counters, int(number_of_counters), n, int(d),
          weight.stride(0), float(eps));
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
    dispatch_layout(d, [&](auto layout) {
      using L = decltype(layout);
      const auto kernel = accumulate ? backward_kernel<L, T, true> : backward_kernel<L, T, false>;
      const int64_t blocks = persistent_blocks(kernel, L::kBlock, (n + L::kGroups - 1) / L::kGroups);
      kernel<<<blocks, L::kBlock, 0, current_stream(weight)>>>(
          static_cast<T*>(grad_weight.data_ptr()), pointer(grad_value), static_cast<const T*>(weight.data_ptr()),
          optional_pointer(row_weight), pointer(column_sum), pointer(inverse_norm), optional_pointer(total_weight), n,
          int(d), weight.stride(0), grad_weight.stride(0), float(1 / eps));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CUDA, m) {
  m.impl("cosreg_forward", TORCH_BOX(&repdeg_fast::cosreg_forward));
  m.impl("cosreg_backward", TORCH_BOX(&repdeg_fast::cosreg_backward));
}
