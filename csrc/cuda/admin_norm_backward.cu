// The backward pass of ADMIN's residual block in CUDA.
//
// Bandwidth-bound: it must read dy and y (and x, for dω) and write dx and df. A group of threads holds a row together,
// as in the forward pass, and beside it, for as long as the block lives, its columns' share of four parameter gradients.
// That makes registers scarce: the next rows wait in a ring in shared memory, of which one stage is always the row that
// is worked on, and parameters come from L1 again for each row, but for 1/γ, which is worth its registers where a thread
// has one pack. One launch, and one that adds up the blocks' sums; no float atomics. Longer rows take the row means of
// their gradient in a launch of its own, after which columns need nothing of each other.
#include "admin_norm_block.cuh"

namespace repdeg_fast {
namespace {

constexpr int kParameters = 4;  // ω, γ, β, branch bias: the order of their sums
constexpr int kReduceColumns = 32, kReduceLanes = 8;

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
      const auto inverse = kFromOutput ? inverse_of(weight) : weight;
      const auto n = normalized<kFromOutput>(b, Pack<T>::load(first + column), branch, bits, inverse, mu, r, column);
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
// add theirs up at the end, in order. With `means` a row may be spread over blocks (blockIdx.y).
template <typename T, int kPacks, bool kFromOutput, bool kBranchBias>
__global__ void __launch_bounds__(kPacks == 4 ? kLongThreads : kMaxThreads, 1)
    backward_kernel(Block<T> b, T* grad_x, T* grad_branch, float* partial, const float2* means, bool sum_omega,
                    int group_threads, int stages) {
  extern __shared__ uint4 staged[];
  __shared__ float2 scratch[2 * kMaxThreads / 32];
  constexpr int S = Pack<T>::size;
  constexpr int kX = kFromOutput ? 2 : 1;  // x's place in the ring
  const Group group(group_threads);
  const int column_step = group_threads * S, block_column = blockIdx.y * column_step * kPacks;
  const int first_column = block_column + group.lane * S, columns = min(b.d - block_column, column_step * kPacks);
  const int step = gridDim.x * group.count();
  int64_t row = int64_t(blockIdx.x) * group.count() + group.index;
  GroupSum sum{scratch};
  auto ring = row_ring<T, 3>(staged, columns, stages, group);
  const auto fetch = [&](int64_t row) {
    ring.fill(row < b.n, [&](int stream) -> const T* {
      if (stream == 0) return b.grad_y + row * b.d + block_column;
      if (stream == kX) return !kFromOutput || sum_omega ? b.x + row * b.x_stride + block_column : nullptr;
      return (kFromOutput ? b.y + row * b.d : b.branch + row * b.branch_stride) + block_column;
    });
  };
  Floats<S> omega_sum[kPacks], weight_sum[kPacks], bias_sum[kPacks], branch_bias_sum[kPacks];  // the last if wanted
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    omega_sum[k] = weight_sum[k] = bias_sum[k] = branch_bias_sum[k] = Floats<S>::all(0);
  constexpr bool kKeepInverse = kFromOutput && kPacks == 1;  // more do not fit beside the sums
  Floats<S> inverse_weight[kKeepInverse ? kPacks : 1];
  if (kKeepInverse && first_column < b.d)
    inverse_weight[0] = inverse_of(Floats<S>::parameter(b.weight, first_column, 1));

  ring.begin(stages - 1, [&](int s) { fetch(row + int64_t(s) * step); });
  for (; row < b.n + group.index; row += step, ring.next()) {
    const bool here = row < b.n;
    ring.wait(here);
    const auto read = [&](int stream, int column) { return Pack<T>::load(ring.row(stream) + column - block_column); };
    const float r = here ? b.rstd[row] : 0, mu = here && !kFromOutput ? b.mean[row] : 0;
    uint32_t bits[kPacks];
    Floats<S> n[kPacks];
    float2 total{0, 0};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int column = first_column + k * column_step;
      if (!here || column >= b.d) continue;
      bits[k] = kept_bits(b, row, column);
      const auto weight = Floats<S>::parameter(b.weight, column, 1);
      const auto second = kFromOutput ? Pack<T>{} : read(2, column);
      const auto inverse = kKeepInverse ? inverse_weight[kKeepInverse ? k : 0] : inverse_of(weight);
      n[k] = normalized<kFromOutput>(b, read(1, column), second, bits[k], inverse, mu, r, column);
      const auto dy = read(0, column);
      for (int j = 0; j < S; ++j) {
        const float upstream = to_float(dy.value[j]), g = upstream * weight.value[j];
        total.x += g;
        total.y += g * n[k].value[j];
        weight_sum[k].value[j] += upstream * n[k].value[j];
        bias_sum[k].value[j] += upstream;
      }
    }
    if (means) {
      __syncthreads();
    } else {
      total = sum(total, group);
    }
    fetch(row + int64_t(stages - 1) * step);  // where the row before lay: all have met since they read it
    if (!here) continue;
    total = means ? means[row] : float2{total.x / b.d, total.y / b.d};
    const float c1 = b.center ? total.x : 0, c2 = total.y;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int column = first_column + k * column_step;
      if (column >= b.d) continue;
      const auto weight = Floats<S>::parameter(b.weight, column, 1), omega = Floats<S>::parameter(b.omega, column, 1);
      const auto dy = read(0, column), x = !kFromOutput || sum_omega ? read(kX, column) : Pack<T>{};
      Pack<T> dx, df;
      for (int j = 0; j < S; ++j) {
        const float dz = r * (to_float(dy.value[j]) * weight.value[j] - c1 - c2 * n[k].value[j]);
        const float branch = dz * keep(bits[k], j, b.scale);
        dx.value[j] = from_float<T>(dz * omega.value[j]);
        df.value[j] = from_float<T>(branch);
        omega_sum[k].value[j] += dz * to_float(x.value[j]);
        if (kBranchBias) branch_bias_sum[k].value[j] += branch;
      }
      dx.store(grad_x + row * b.d + column);
      if (grad_branch) df.store(grad_branch + row * b.d + column);
    }
  }

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
  if (kBranchBias) add_groups(branch_bias_sum, 3);
}

struct ParameterGradients {  // null where not asked for
  float *omega, *weight, *bias, *branch_bias;
  __device__ float* of(int parameter) const {
    return parameter == 0 ? omega : parameter == 1 ? weight : parameter == 2 ? bias : branch_bias;
  }
  bool any() const { return omega || weight || bias || branch_bias; }
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

// f(number of packs a thread) for a row that fits into a block's registers; false for a longer one. Two packs for half as
// many threads, where the sums leave them registers: two blocks on a multiprocessor, of which one works while the other
// meets, or twice the warps in the longest rows.
template <typename T, bool kFromOutput, bool kBranchBias, typename F>
bool dispatch_backward(int64_t d, F&& f) {
  constexpr int S = Pack<T>::size;
  if (d <= kLongThreads * S) return f(std::integral_constant<int, 1>{}), true;
  if constexpr (S == 4 || (kFromOutput && !kBranchBias)) {
    if (d <= kMaxThreads * 2 * S) return f(std::integral_constant<int, 2>{}), true;
    return false;
  } else {
    return dispatch_packs<T>(d, f);
  }
}

template <typename T, bool kFromOutput, bool kBranchBias>
void backward(const Block<T>& b, T* grad_x, T* grad_branch, const ParameterGradients& gradients, const Tensor& like,
              cudaStream_t stream) {
  const auto launch = [&](auto packs, const Layout& layout, int64_t column_blocks, const float2* means) {
    const auto kernel = backward_kernel<T, packs.value, kFromOutput, kBranchBias>;
    const int64_t columns = int64_t(layout.threads) * packs.value * Pack<T>::size;
    const auto [stages, shared] = ring_size<T, 3>(layout.groups, b.d < columns ? b.d : columns);
    STD_TORCH_CHECK(stages > 1, "admin_norm: no shared memory on this device for two rows of ", b.d, " values");
    const int64_t resident = resident_blocks(kernel, layout, shared, b.n * column_blocks);
    const int64_t blocks = (resident + column_blocks - 1) / column_blocks;
    const int64_t size[] = {blocks, kParameters, b.d};  // nvcc's front end makes nonsense of a list in the call
    const Tensor partial_tensor = torch::stable::new_empty(like, size, ScalarType::Float);
    float* partial = static_cast<float*>(partial_tensor.data_ptr());
    const dim3 grid(blocks, column_blocks), reduce_grid((b.d + kReduceColumns - 1) / kReduceColumns, kParameters);
    kernel<<<grid, layout.block(), shared, stream>>>(b, grad_x, grad_branch, partial, means, gradients.omega,
                                                     layout.threads, stages);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (!gradients.any()) return;
    reduce_kernel<<<reduce_grid, kReduceColumns * kReduceLanes, 0, stream>>>(gradients, partial, int(blocks), b.d);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  const bool whole = dispatch_backward<T, kFromOutput, kBranchBias>(b.d, [&](auto packs) {
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
    const auto run = [&](auto from_output, auto branch_bias) {
      backward<T, from_output.value, branch_bias.value>(b, dx, df, gradients, rstd, current_stream(grad_y));
    };
    const auto choose = [&](auto from_output) {
      wants_branch_bias ? run(from_output, std::true_type{}) : run(from_output, std::false_type{});
    };
    y ? choose(std::true_type{}) : choose(std::false_type{});
  });
  return {grad_x, grad_branch, grad_omega, grad_weight, grad_bias, grad_branch_bias};
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CUDA, m) { m.impl("admin_norm_backward", TORCH_BOX(&repdeg_fast::admin_norm_backward)); }
