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

constexpr int kReduceColumns = 32, kReduceLanes = 8;

// How a row of up to kThreads * kValues values is spread: `kThreads` threads of a block of `kBlock` hold it together.
template <int kThreads_, int kBlock_, int kValues_>
struct Layout {
  static constexpr int kThreads = kThreads_, kBlock = kBlock_, kValues = kValues_, kGroups = kBlock / kThreads;
};

template <typename L>
__device__ float row_sum(float x, float* scratch) {
  if constexpr (L::kThreads == 32) {
    return warp_sum(x);
  } else {
    return block_sum(x, scratch);
  }
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

// Σ (factor·x)² over a row.
template <typename L, typename T>
__device__ float row_square(RowPart<L, T>& x, float factor, int lane, int d, float* scratch) {
  float squared = 0;
  x.each(lane, d, [&](int, int, const Pack<T>& pack) {
    for (int j = 0; j < Pack<T>::size; ++j) {
      const float value = to_float(pack.value[j]) * factor;
      squared += value * value;
    }
  });
  return row_sum<L>(squared, scratch);
}

// ‖x‖; NaN where its square overflows, which must not look like a zero row. Squares of tiny values would be lost: those
// rows are looked at again, enlarged.
template <typename L, typename T>
__device__ float row_norm(RowPart<L, T>& x, int lane, int d, float* scratch) {
  constexpr float kEnlarge = 0x1p64f, kTiny = 0x1p-96f;
  const float squared = row_square(x, 1.f, lane, d, scratch);
  if (isinf(squared)) return NAN;
  if (!(squared < kTiny)) return sqrtf(squared);
  return sqrtf(row_square(x, kEnlarge, lane, d, scratch)) / kEnlarge;
}

template <typename L, typename T>
__global__ void __launch_bounds__(L::kBlock)
    forward_kernel(const T* weight, const float* row_weight, float* inverse_norm, float* partial_sum,
                   float* partial_self, float* partial_total, int* counter, int64_t n, int d, int64_t row_stride,
                   float eps) {
  extern __shared__ float shared[];  // kGroups > 1: d values, to add the groups' column sums
  __shared__ float scratch[L::kBlock / 32];
  const int group = threadIdx.x / L::kThreads, lane = threadIdx.x % L::kThreads;
  float column_sum[L::kValues] = {};
  float self_sum = 0, total = 0;
  const int64_t first_row = int64_t(blockIdx.x) * L::kGroups + group, step = int64_t(gridDim.x) * L::kGroups;
  RowPart<L, T> x, next;
  if (first_row < n) next.load(weight + first_row * row_stride, lane, d);
  for (int64_t row = first_row; row < n; row += step) {
    x = next;
    if (row + step < n) next.load(weight + (row + step) * row_stride, lane, d);
    const float norm = row_norm<L>(x, lane, d, scratch);
    // fmaxf would drop a NaN
    const float inverse = norm == 0 ? 0 : 1 / (norm < eps ? eps : norm);
    // ‖ŵ‖ is 1 by definition, and less only where eps is what divides
    const float unit = norm == 0 ? 0 : (inverse * eps < 1 ? 1 : norm * inverse);
    float p = row_weight ? row_weight[row] : 1;
    if (p < 0) p = NAN;
    const float coefficient = p * inverse;
    x.each(lane, d, [&](int, int first, const Pack<T>& pack) {
      for (int j = 0; j < Pack<T>::size; ++j) column_sum[first + j] += coefficient * to_float(pack.value[j]);
    });
    self_sum += p * p * unit * unit;
    total += p;
    if (lane == 0) inverse_norm[row] = inverse;
  }

  float* out = partial_sum + int64_t(blockIdx.x) * d;
  for (int g = 0; g < L::kGroups; ++g) {  // one group after the other: a fixed order
    if (group == g) {
      x.each(lane, d, [&](int column, int first, const Pack<T>&) {
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
    if (blockIdx.x == 0) *counter = 0;  // for the next launch
  }
}

__device__ double ordered_sum(const float* values, int count, double* scratch) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += values[i];
  return block_sum(sum, scratch);
}

// Column sums over the blocks of the first launch. The last block to finish (an integer counter) adds up all blocks'
// squares in block order, so that R needs no third launch and does not depend on who was last.
__global__ void __launch_bounds__(kReduceColumns * kReduceLanes)
    reduce_kernel(const float* partial_sum, const float* partial_self, const float* partial_total,
                  double* block_square, int* counter, float* column_sum, float* value, float* total_weight,
                  int partials, int d) {
  __shared__ double lanes[kReduceLanes][kReduceColumns];
  __shared__ double scratch[kReduceLanes];
  __shared__ bool is_last;
  const int x = threadIdx.x % kReduceColumns, y = threadIdx.x / kReduceColumns;
  const int column = blockIdx.x * kReduceColumns + x;
  double sum = 0;
  if (column < d)
    for (int r = y; r < partials; r += kReduceLanes) sum += partial_sum[int64_t(r) * d + column];
  lanes[y][x] = sum;
  __syncthreads();
  if (y == 0) {
    for (int k = 1; k < kReduceLanes; ++k) sum += lanes[k][x];
    if (column < d) column_sum[column] = float(sum);
    const double square = warp_sum(sum * sum);
    if (x == 0) {
      block_square[blockIdx.x] = square;
      __threadfence();
      is_last = atomicAdd(counter, 1) == int(gridDim.x) - 1;
    }
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  double square = 0;
  for (int i = threadIdx.x; i < int(gridDim.x); i += blockDim.x) square += __ldcg(block_square + i);
  square = block_sum(square, scratch);
  const double self_sum = ordered_sum(partial_self, partials, scratch);
  const double total = ordered_sum(partial_total, partials, scratch);
  if (threadIdx.x == 0) {
    *value = float((square - self_sum) / (total * total));
    *total_weight = float(total);
  }
}

// grad = a·(s − b·x) a row, with a = 2 g p / (P² ‖w‖) and b = (s·ŵ) / ‖w‖; s stays in registers throughout.
template <typename L, typename T>
__global__ void __launch_bounds__(L::kBlock)
    backward_kernel(T* grad_weight, const float* grad_value, const T* weight, const float* row_weight,
                    const float* column_sum, const float* inverse_norm, const float* total_weight, int64_t n, int d,
                    int64_t row_stride, int64_t grad_row_stride, float largest_inverse, bool accumulate) {
  __shared__ float scratch[L::kBlock / 32];
  const int group = threadIdx.x / L::kThreads, lane = threadIdx.x % L::kThreads;
  const float total = total_weight ? *total_weight : float(n);
  const float scale = 2 * *grad_value / (total * total);
  float s[L::kValues] = {};
  const int64_t first_row = int64_t(blockIdx.x) * L::kGroups + group, step = int64_t(gridDim.x) * L::kGroups;
  RowPart<L, T> x, next, gradient;
  x.each(lane, d, [&](int column, int first, const Pack<T>&) {
    for (int j = 0; j < Pack<T>::size; ++j) s[first + j] = column_sum[column + j];
  });
  if (first_row < n) next.load(weight + first_row * row_stride, lane, d);
  for (int64_t row = first_row; row < n; row += step) {
    T* out = grad_weight + row * grad_row_stride;
    x = next;
    if (accumulate) gradient.load(out, lane, d);
    if (row + step < n) next.load(weight + (row + step) * row_stride, lane, d);
    float product = 0;
    x.each(lane, d, [&](int, int first, const Pack<T>& pack) {
      for (int j = 0; j < Pack<T>::size; ++j) product += s[first + j] * to_float(pack.value[j]);
    });
    product = row_sum<L>(product, scratch);
    const float inverse = inverse_norm[row], p = row_weight ? row_weight[row] : 1;
    // where eps is what divides, ŵ is linear in w and nothing is projected out
    const float along = inverse >= largest_inverse ? p : product * inverse;
    const float a = scale * p * inverse, b = along * inverse;
    gradient.each(lane, d, [&](int column, int first, Pack<T>& pack) {
      const Pack<T>& row_values = x.pack[first / Pack<T>::size];
      for (int j = 0; j < Pack<T>::size; ++j) {
        const float before = accumulate ? to_float(pack.value[j]) : 0;
        pack.value[j] = from_float<T>(before + a * (s[first + j] - b * to_float(row_values.value[j])));
      }
      pack.store(out + column);
    });
  }
}

// The narrowest layout that holds a row of d values: at most 32 values a thread, so that several blocks fit on a
// multiprocessor and nothing spills.
template <typename F>
void dispatch_layout(int64_t d, F&& f) {
  if (d <= 32 * 8) return f(Layout<32, 128, 8>{});
  if (d <= 32 * 24) return f(Layout<32, 128, 24>{});
  if (d <= 32 * 32) return f(Layout<32, 128, 32>{});
  if (d <= 128 * 24) return f(Layout<128, 128, 24>{});
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
      const Tensor block_square = empty({reduce_blocks}, ScalarType::Double), counter = empty({}, ScalarType::Int);
      int* count = static_cast<int*>(counter.data_ptr());
      float* partial_self = pointer(partials);
      float* partial_total = partial_self + blocks;
      const size_t shared = L::kGroups > 1 ? d * sizeof(float) : 0;
      kernel<<<blocks, L::kBlock, shared, stream>>>(
          static_cast<const T*>(weight.data_ptr()), optional_pointer(row_weight), pointer(inverse),
          pointer(partial_sum), partial_self, partial_total, count, n, int(d), weight.stride(0), float(eps));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      reduce_kernel<<<reduce_blocks, kReduceColumns * kReduceLanes, 0, stream>>>(
          pointer(partial_sum), partial_self, partial_total, static_cast<double*>(block_square.data_ptr()), count,
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
      const auto kernel = backward_kernel<L, T>;
      const int64_t blocks = persistent_blocks(kernel, L::kBlock, (n + L::kGroups - 1) / L::kGroups);
      kernel<<<blocks, L::kBlock, 0, current_stream(weight)>>>(
          static_cast<T*>(grad_weight.data_ptr()), pointer(grad_value), static_cast<const T*>(weight.data_ptr()),
          optional_pointer(row_weight), pointer(column_sum), pointer(inverse_norm), optional_pointer(total_weight), n,
          int(d), weight.stride(0), grad_weight.stride(0), float(1 / eps), accumulate);
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
