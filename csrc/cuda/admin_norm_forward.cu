// The forward pass of ADMIN's residual block in CUDA.
//
// Bandwidth-bound: it must read x and the branch and write y. A group of threads holds a row together, 16 bytes of each
// matrix a thread (64 in the longest rows). The next rows wait in a ring in shared memory. Longer rows are walked over
// three times (from the L2 cache after the first).
#include "admin_norm_block.cuh"

namespace repdeg_fast {
namespace {

// A step takes a row for each group. All threads of a block make the same steps, with or without a row: sums over a
// group meet at the block's barrier.
template <typename T, int kPacks>
__global__ void __launch_bounds__(kPacks == 1 ? kMaxThreads : kLongThreads, 2)
    forward_kernel(Block<T> b, T* y, float* mean, float* rstd, int group_threads, float eps, int stages) {
  extern __shared__ uint4 staged[];
  __shared__ float2 scratch[2 * kMaxThreads / 32];
  constexpr int S = Pack<T>::size;
  const Group group(group_threads);
  const int first_column = group.lane * S, column_step = group_threads * S;
  const int step = gridDim.x * group.count();
  int64_t row = int64_t(blockIdx.x) * group.count() + group.index;
  GroupSum sum{scratch};
  auto ring = row_ring<T, 2>(staged, b.d, stages, group);
  const auto fetch = [&](int64_t row) {
    ring.fill(row < b.n, [&](int stream) {
      return stream == 0 ? b.x + row * b.x_stride : b.branch + row * b.branch_stride;
    });
  };
  ring.begin(stages, [&](int s) { fetch(row + int64_t(s) * step); });
  for (; row < b.n + group.index; row += step) {
    ring.wait(row < b.n);
    const T *x = ring.row(0), *branch = ring.row(1);
    Floats<S> z[kPacks];
    float total = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int column = first_column + k * column_step;
      z[k] = Floats<S>::all(0);
      if (row < b.n && column < b.d)
        z[k] = residual_sum(b, Pack<T>::load(x + column), Pack<T>::load(branch + column), kept_bits(b, row, column),
                            column);
      for (int j = 0; j < S; ++j) total += z[k].value[j];
    }
    Deviations deviations{b.center ? sum({total, 0}, group).x / b.d : 0};
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (first_column + k * column_step < b.d) deviations.add(z[k]);
    const Moments moments = deviations.moments(b, eps, sum, group);
    fetch(row + int64_t(stages) * step);  // all have met in the sums since they read the row
    ring.next();
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
      const auto [stages, shared] = ring_size<T, 2>(layout.groups, d);
      const int64_t blocks = resident_blocks(kernel, layout, shared, n);
      kernel<<<blocks, layout.block(), shared, stream>>>(b, out, mu, r, layout.threads, float(eps), stages);
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

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CUDA, m) { m.impl("admin_norm_forward", TORCH_BOX(&repdeg_fast::admin_norm_forward)); }
