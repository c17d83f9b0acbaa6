// ADMIN's residual block in CUDA. Mathematics: repdeg_fast/reference/admin_norm.py.
//
// Bandwidth-bound: forward must read x and the branch and write y, backward must read dy and y (and x, for dω) and
// write dx and df. A group of threads holds a row together, 16 bytes of each matrix a thread (64 in the longest rows),
// and beside it, for as long as the block lives, its columns' share of four parameter gradients. That makes registers
// scarce, so the next row waits in shared memory: each thread copies its own part of it there, past the registers,
// while it works on the row before, and reads only what it copied itself. Parameters come from L1 again for each row,
// n is made twice. Backward takes one launch, and one that adds up the blocks' sums; no float atomics.
//
// Longer rows are read twice: forward walks over a row three times (from the L2 cache after the first), backward takes
// the row means of its gradient in a launch of its own, after which columns need nothing of each other.
#include <optional>
#include <utility>

#include "admin_norm_block.cuh"

namespace repdeg_fast {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr int kLongPacks = 4;         // packs a thread in the longest rows that are held,
constexpr int kLongThreads = 256;     // by this many threads of 255 registers
constexpr int kGroupedThreads = 256;  // groups of fewer threads share a block of about this many, and its sums
constexpr int kParameters = 4;        // ω, γ, β, branch bias: the order of their sums
constexpr int kReduceColumns = 32, kReduceLanes = 8;

// A step takes a row for each group. All threads of a block make the same steps, with or without a row: sums over a
// group meet at the block's barrier.
template <typename T, int kPacks>
__global__ void __launch_bounds__(kPacks == 1 ? kMaxThreads : kLongThreads, 1)
    forward_kernel(Block<T> b, T* y, float* mean, float* rstd, int group_threads, float eps) {
  extern __shared__ uint4 staged[];
  __shared__ float2 scratch[2 * kMaxThreads / 32];
  constexpr int S = Pack<T>::size;
  const Group group(group_threads);
  const int first_column = group.lane * S, column_step = group_threads * S;
  const int step = gridDim.x * group.count();
  int64_t row = int64_t(blockIdx.x) * group.count() + group.index;
  GroupSum sum{scratch};
  Prefetch<T, kPacks, 2> prefetch{staged};
  const auto fetch = [&](int64_t row) {
    if (row >= b.n) return;
    prefetch.copy(0, b.x + row * b.x_stride, first_column, column_step, b.d);
    prefetch.copy(1, b.branch + row * b.branch_stride, first_column, column_step, b.d);
  };
  fetch(row);
  __pipeline_commit();
  for (; row < b.n + group.index; row += step) {
    prefetch.next([&] { fetch(row + step); });
    Floats<S> z[kPacks];
    float total = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int column = first_column + k * column_step;
      z[k] = Floats<S>::all(0);
      if (row < b.n && column < b.d)
        z[k] = residual_sum(b, prefetch.read(0, k), prefetch.read(1, k), kept_bits(b, row, column), column);
      for (int j = 0; j < S; ++j) total += z[k].value[j];
    }
    Deviations deviations{b.center ? sum({total, 0}, group).x / b.d : 0};
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (first_column + k * column_step < b.d) deviations.add(z[k]);
    const Moments moments = deviations.moments(b, eps, sum, group);
    if (row >= b.n) continue;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int column = first_column + k * column_step;
      if (column < b.d) affine(b, z[k], moments, column).store(y + row * b.d + column);
    }
    if (group.lane == 0) {
      mean[row] = moments.mean;
      rstd[row] = moments.rstd;
    }
  }
}

// A row a block at a time, made anew from the inputs for its mean, its variance and its output.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    long_forward_kernel(Block<T> b, T* y, float* mean, float* rstd, float eps) {
  __shared__ float2 scratch[2 * kMaxThreads / 32];
  constexpr int S = Pack<T>::size;
  const Group group(blockDim.x);
  GroupSum sum{scratch};
  for (int64_t row = blockIdx.x; row < b.n; row += gridDim.x) {
    const auto each = [&](auto&& f) {  // f(column, z)
      for (int column = threadIdx.x * S; column < b.d; column += blockDim.x * S) {
        const auto x = Pack<T>::load(b.x + row * b.x_stride + column);
        const auto branch = Pack<T>::load(b.branch + row * b.branch_stride + column);
        f(column, residual_sum(b, x, branch, kept_bits(b, row, column), column));
      }
    };
    Deviations deviations{0};
    if (b.center) {
      float total = 0;
      each([&](int, const Floats<S>& z) {
        for (int j = 0; j < S; ++j) total += z.value[j];
      });
      deviations.origin = sum({total, 0}, group).x / b.d;
    }
    each([&](int, const Floats<S>& z) { deviations.add(z); });
    const Moments moments = deviations.moments(b, eps, sum, group);
    each([&](int column, const Floats<S>& z) { affine(b, z, moments, column).store(y + row * b.d + column); });
    if (threadIdx.x == 0) {
      mean[row] = moments.mean;
      rstd[row] = moments.rstd;
    }
  }
}

// The means of g = dy ⊙ γ and of g ⊙ n, a row a block at a time.
template <typename T, bool kFromOutput>
__global__ void __launch_bounds__(kMaxThreads) means_kernel(Block<T> b, float2* means) {
  __shared__ float2 scratch[2 * kMaxThreads / 32];
  constexpr int S = Pack<T>::size;
  const Group group(blockDim.x);
  GroupSum sum{scratch};
  for (int64_t row = blockIdx.x; row < b.n; row += gridDim.x) {
    const T* first = kFromOutput ? b.y + row * b.d : b.x + row * b.x_stride;
    const float mu = kFromOutput ? 0 : b.mean[row], r = b.rstd[row];
    float2 total{0, 0};
    for (int column = threadIdx.x * S; column < b.d; column += blockDim.x * S) {
      const auto dy = Pack<T>::load(b.grad_y + row * b.d + column);
      const auto branch = kFromOutput ? Pack<T>{} : Pack<T>::load(b.branch + row * b.branch_stride + column);
      const auto weight = Floats<S>::parameter(b.weight, column, 1);
      const uint32_t bits = kFromOutput ? 0 : kept_bits(b, row, column);
      const auto n = normalized<kFromOutput>(b, Pack<T>::load(first + column), branch, bits, weight, mu, r, column);
      for (int j = 0; j < S; ++j) {
        const float g = to_float(dy.value[j]) * weight.value[j];
        total.x += g;
        total.y += g * n.value[j];
      }
    }
    total = sum(total, group);
    if (threadIdx.x == 0) means[row] = float2{total.x / b.d, total.y / b.d};
  }
}

// Steps as in forward. Each thread keeps its columns' sums for the parameters over all rows it sees; the block's groups
// add theirs up at the end, in order. With `means` a row may be spread over blocks (blockIdx.y) and nobody waits.
template <typename T, int kPacks, bool kFromOutput>
__global__ void __launch_bounds__(kPacks == 1 ? kMaxThreads : kLongThreads, 1)
    backward_kernel(Block<T> b, T* grad_x, T* grad_branch, float* partial, const float2* means, bool sum_omega,
                    bool sum_branch_bias, int group_threads) {
  extern __shared__ uint4 staged[];
  __shared__ float2 scratch[2 * kMaxThreads / 32];
  constexpr int S = Pack<T>::size;
  constexpr int kX = kFromOutput ? 2 : 1;  // x's place among the prefetched matrices
  const Group group(group_threads);
  const int column_step = group_threads * S, first_column = blockIdx.y * column_step * kPacks + group.lane * S;
  const int step = gridDim.x * group.count();
  int64_t row = int64_t(blockIdx.x) * group.count() + group.index;
  GroupSum sum{scratch};
  Prefetch<T, kPacks, 3> prefetch{staged};
  const auto fetch = [&](int64_t row) {
    if (row >= b.n) return;
    prefetch.copy(0, b.grad_y + row * b.d, first_column, column_step, b.d);
    if (kFromOutput) prefetch.copy(1, b.y + row * b.d, first_column, column_step, b.d);
    if (!kFromOutput || sum_omega) prefetch.copy(kX, b.x + row * b.x_stride, first_column, column_step, b.d);
    if (!kFromOutput) prefetch.copy(2, b.branch + row * b.branch_stride, first_column, column_step, b.d);
  };
  Floats<S> omega_sum[kPacks], weight_sum[kPacks], bias_sum[kPacks], branch_bias_sum[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    omega_sum[k] = weight_sum[k] = bias_sum[k] = branch_bias_sum[k] = Floats<S>::all(0);

  fetch(row);
  __pipeline_commit();
  for (; row < b.n + group.index; row += step) {
    prefetch.next([&] { fetch(row + step); });
    const bool here = row < b.n;
    const float r = here ? b.rstd[row] : 0, mu = here && !kFromOutput ? b.mean[row] : 0;
    uint32_t bits[kPacks];
    // each(f): f(k, column, dy, weight, n) for each pack of the row. Called twice: n is made again, not kept.
    const auto each = [&](auto&& f) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int column = first_column + k * column_step;
        if (!here || column >= b.d) continue;
        const auto weight = Floats<S>::parameter(b.weight, column, 1);
        const auto second = kFromOutput ? Pack<T>{} : prefetch.read(2, k);
        const auto n = normalized<kFromOutput>(b, prefetch.read(1, k), second, bits[k], weight, mu, r, column);
        f(k, column, prefetch.read(0, k), weight, n);
      }
    };
#pragma unroll
    for (int k = 0; k < kPacks; ++k) bits[k] = kept_bits(b, row, first_column + k * column_step);
    float2 total{0, 0};
    each([&](int k, int, const Pack<T>& dy, const Floats<S>& weight, const Floats<S>& n) {
      for (int j = 0; j < S; ++j) {
        const float upstream = to_float(dy.value[j]), g = upstream * weight.value[j];
        total.x += g;
        total.y += g * n.value[j];
        weight_sum[k].value[j] += upstream * n.value[j];
        bias_sum[k].value[j] += upstream;
      }
    });
    if (!means) total = sum(total, group);
    if (!here) continue;
    total = means ? means[row] : float2{total.x / b.d, total.y / b.d};
    const float c1 = b.center ? total.x : 0, c2 = total.y;
    each([&](int k, int column, const Pack<T>& dy, const Floats<S>& weight, const Floats<S>& n) {
      const auto omega = Floats<S>::parameter(b.omega, column, 1);
      const auto x = !kFromOutput || sum_omega ? prefetch.read(kX, k) : Pack<T>{};
      Pack<T> dx, df;
      for (int j = 0; j < S; ++j) {
        const float dz = r * (to_float(dy.value[j]) * weight.value[j] - c1 - c2 * n.value[j]);
        const float branch = dz * keep(bits[k], j, b.scale);
        dx.value[j] = from_float<T>(dz * omega.value[j]);
        df.value[j] = from_float<T>(branch);
        omega_sum[k].value[j] += dz * to_float(x.value[j]);
        branch_bias_sum[k].value[j] += branch;
      }
      dx.store(grad_x + row * b.d + column);
      if (grad_branch) df.store(grad_branch + row * b.d + column);
    });
  }

  __pipeline_wait_prior(0);
  float* shared = reinterpret_cast<float*>(staged);
  float* out = partial + int64_t(blockIdx.x) * kParameters * b.d;
  const auto add_groups = [&](const Floats<S>(&sums)[kPacks], int parameter) {
    for (int g = 0; g < group.count(); ++g) {
      __syncthreads();
      if (group.index != g) continue;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int column = first_column + k * column_step;
        if (column >= b.d) continue;
        Floats<S> value = sums[k];
        if (g > 0) {
          const auto before = Floats<S>::load(shared + column);
          for (int j = 0; j < S; ++j) value.value[j] += before.value[j];
        }
        value.store(g + 1 < group.count() ? shared + column : out + parameter * b.d + column);
      }
    }
  };
  if (sum_omega) add_groups(omega_sum, 0);
  add_groups(weight_sum, 1);
  add_groups(bias_sum, 2);
  if (sum_branch_bias) add_groups(branch_bias_sum, 3);
}

struct ParameterGradients {  // null where not asked for
  float *omega, *weight, *bias, *branch_bias;
  __device__ float* of(int parameter) const {
    return parameter == 0 ? omega : parameter == 1 ? weight : parameter == 2 ? bias : branch_bias;
  }
};

// Sums over the blocks of the launch before, in a fixed order; blockIdx.y is the parameter.
__global__ void __launch_bounds__(kReduceColumns * kReduceLanes)
    reduce_kernel(ParameterGradients gradients, const float* partial, int partials, int d) {
  __shared__ double lanes[kReduceLanes][kReduceColumns];
  const int x = threadIdx.x % kReduceColumns, lane = threadIdx.x / kReduceColumns;
  const int column = blockIdx.x * kReduceColumns + x, parameter = blockIdx.y;
  float* out = gradients.of(parameter);
  if (!out) return;
  double sum = 0;
  if (column < d)
    for (int r = lane; r < partials; r += kReduceLanes)
      sum += partial[(int64_t(r) * kParameters + parameter) * d + column];
  lanes[lane][x] = sum;
  __syncthreads();
  if (lane > 0 || column >= d) return;
  for (int k = 1; k < kReduceLanes; ++k) sum += lanes[k][x];
  out[column] = float(sum);
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
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  const int64_t blocks = persistent_blocks(kernel, layout.block(), (rows + layout.groups - 1) / layout.groups, shared);
  return blocks > 0 ? blocks : 1;
}

template <typename T>
const T* pointer(const MaybeTensor& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// Parameters are read 16 bytes at a time; a view into a flat buffer may start anywhere.
MaybeTensor aligned(const MaybeTensor& parameter) {
  const bool there = parameter && reinterpret_cast<uintptr_t>(parameter->data_ptr()) % sizeof(uint4);
  return there ? MaybeTensor(torch::stable::clone(*parameter)) : parameter;
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

std::tuple<Tensor, Tensor, Tensor> admin_norm_forward(const Tensor& x, const Tensor& branch, const MaybeTensor& omega,
                                                      const MaybeTensor& weight, const MaybeTensor& bias,
                                                      const MaybeTensor& branch_bias, const MaybeTensor& seed,
                                                      double dropout, double eps, bool center) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const int64_t n = x.size(0), d = x.size(1);
  Tensor y = torch::stable::new_empty(x, {n, d}), mean = torch::stable::new_empty(x, {n}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {n}, ScalarType::Float);
  float *mu = static_cast<float*>(mean.data_ptr()), *r = static_cast<float*>(rstd.data_ptr());
  const Parameters parameters(omega, weight, bias, branch_bias);
  dispatch_floating(x.scalar_type(), "admin_norm_forward", [&](auto type) {
    using T = decltype(type);
    Block<T> b = block_of<T>(x, branch, parameters, seed, dropout, center);
    b.n = n, b.d = int(d);
    T* out = static_cast<T*>(y.data_ptr());
    const bool whole = dispatch_packs<T>(d, [&](auto packs) {
      const auto kernel = forward_kernel<T, packs.value>;
      const Layout layout = Layout::of_columns(packs.value * Pack<T>::size, d);
      const size_t shared = Prefetch<T, packs.value, 2>::bytes(layout.block());
      const int64_t blocks = resident_blocks(kernel, layout, shared, n);
      kernel<<<blocks, layout.block(), shared, stream>>>(b, out, mu, r, layout.threads, float(eps));
    });
    if (!whole) {
      const auto kernel = long_forward_kernel<T>;
      const int64_t blocks = resident_blocks(kernel, {kMaxThreads, 1}, 0, n);
      kernel<<<blocks, kMaxThreads, 0, stream>>>(b, out, mu, r, float(eps));
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {y, mean, rstd};
}

template <typename T, bool kFromOutput>
void backward(const Block<T>& b, T* grad_x, T* grad_branch, const ParameterGradients& gradients, const Tensor& like,
              cudaStream_t stream) {
  const auto launch = [&](auto packs, const Layout& layout, int64_t column_blocks, const float2* means) {
    const auto kernel = backward_kernel<T, packs.value, kFromOutput>;
    const size_t shared = Prefetch<T, packs.value, 3>::bytes(layout.block());
    const int64_t resident = resident_blocks(kernel, layout, shared, b.n * column_blocks);
    const int64_t blocks = (resident + column_blocks - 1) / column_blocks;
    const int64_t size[] = {blocks, kParameters, b.d};  // nvcc's front end makes nonsense of a list in the call
    const Tensor partial_tensor = torch::stable::new_empty(like, size, ScalarType::Float);
    float* partial = static_cast<float*>(partial_tensor.data_ptr());
    const bool sum_omega = gradients.omega, sum_branch_bias = gradients.branch_bias;
    const dim3 grid(blocks, column_blocks), reduce_grid((b.d + kReduceColumns - 1) / kReduceColumns, kParameters);
    kernel<<<grid, layout.block(), shared, stream>>>(b, grad_x, grad_branch, partial, means, sum_omega, sum_branch_bias,
                                                     layout.threads);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    reduce_kernel<<<reduce_grid, kReduceColumns * kReduceLanes, 0, stream>>>(gradients, partial, int(blocks), b.d);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  const bool whole = dispatch_packs<T>(b.d, [&](auto packs) {
    launch(packs, Layout::of_columns(packs.value * Pack<T>::size, b.d), 1, nullptr);
  });
  if (whole) return;
  const int64_t size[] = {b.n, 2};
  const Tensor means_tensor = torch::stable::new_empty(like, size, ScalarType::Float);
  float2* means = static_cast<float2*>(means_tensor.data_ptr());
  const auto kernel = means_kernel<T, kFromOutput>;
  const int64_t blocks = resident_blocks(kernel, {kMaxThreads, 1}, 0, b.n);
  kernel<<<blocks, kMaxThreads, 0, stream>>>(b, means);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const Layout layout{kGroupedThreads, 1};
  const int64_t columns = layout.threads * Pack<T>::size;
  launch(std::integral_constant<int, 1>{}, layout, (b.d + columns - 1) / columns, means);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> admin_norm_backward(
    const Tensor& grad_y, const MaybeTensor& y, const MaybeTensor& x, const MaybeTensor& branch,
    const MaybeTensor& omega, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& branch_bias,
    const MaybeTensor& seed, const MaybeTensor& mean, const Tensor& rstd, double dropout, bool center,
    bool wants_branch, bool wants_omega, bool wants_weight, bool wants_bias, bool wants_branch_bias) {
  const torch::stable::accelerator::DeviceGuard guard(grad_y.get_device_index());
  const int64_t n = grad_y.size(0), d = grad_y.size(1);
  const auto matrix = [&](bool wanted) {
    return wanted ? torch::stable::new_empty(grad_y, {n, d}) : torch::stable::new_empty(grad_y, {0});
  };
  const auto parameter = [&](bool wanted) { return torch::stable::new_empty(rstd, {wanted ? d : 0}); };
  Tensor grad_x = matrix(true), grad_branch = matrix(wants_branch), grad_omega = parameter(wants_omega);
  Tensor grad_weight = parameter(wants_weight), grad_bias = parameter(wants_bias);
  Tensor grad_branch_bias = parameter(wants_branch_bias);
  const auto target = [](const Tensor& t, bool wanted) { return wanted ? static_cast<float*>(t.data_ptr()) : nullptr; };
  const ParameterGradients gradients{target(grad_omega, wants_omega), target(grad_weight, wants_weight),
                                     target(grad_bias, wants_bias), target(grad_branch_bias, wants_branch_bias)};
  const Parameters parameters(omega, weight, bias, branch_bias);
  dispatch_floating(grad_y.scalar_type(), "admin_norm_backward", [&](auto type) {
    using T = decltype(type);
    Block<T> b = block_of<T>(x, branch, parameters, seed, dropout, center);
    b.grad_y = static_cast<const T*>(grad_y.data_ptr());
    b.y = pointer<T>(y);
    b.mean = pointer<float>(mean), b.rstd = static_cast<const float*>(rstd.data_ptr());
    b.n = n, b.d = int(d);
    T *dx = static_cast<T*>(grad_x.data_ptr()), *df = wants_branch ? static_cast<T*>(grad_branch.data_ptr()) : nullptr;
    if (y) {
      backward<T, true>(b, dx, df, gradients, rstd, current_stream(grad_y));
    } else {
      backward<T, false>(b, dx, df, gradients, rstd, current_stream(grad_y));
    }
  });
  return {grad_x, grad_branch, grad_omega, grad_weight, grad_bias, grad_branch_bias};
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CUDA, m) {
  m.impl("admin_norm_forward", TORCH_BOX(&repdeg_fast::admin_norm_forward));
  m.impl("admin_norm_backward", TORCH_BOX(&repdeg_fast::admin_norm_backward));
}
