// ADMIN's residual block on the CPU. Mathematics: repdeg_fast/reference/admin_norm.py.
//
// Bandwidth-bound: forward must read x and the branch once and write y once; backward must read dy and y (and x, for
// dω) once and write dx and df once. Each row is brought into L1 once and all its passes run there. Parameters lie in
// L1 too, absent ones as ones or zeros, so that one loop serves every combination; a dropout mask is drawn into a
// row's buffer, vectorized. Sums over rows are taken within fixed blocks of rows, then over the blocks in order.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "noise.h"
#include "rows.h"

namespace repdeg_fast {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMaxBlocks = 128;  // partial sums: at most this many rows of d for each parameter
constexpr int64_t kMinRows = 32;     // a block

// A parameter's d values; `absent` throughout where it is not given.
template <typename A>
std::vector<A> parameter(const MaybeTensor& given, int64_t d, A absent) {
  if (!given) return std::vector<A>(d, absent);
  const A* data = static_cast<const A*>(given->data_ptr());
  return std::vector<A>(data, data + d);
}

// One row's dropout: 1/(1−p) where a value is kept, 0 where it is dropped; all ones without dropout.
template <typename A>
class Keep {
 public:
  Keep(const MaybeTensor& seed, double dropout, int64_t d)
      : drops_(seed.has_value()),
        seed_(drops_ ? uint64_t(*static_cast<const int64_t*>(seed->data_ptr())) : 0),
        p_(float(dropout)),
        scale_(A(1 / (1 - dropout))),
        words_(drops_ ? (d + 3) / 4 * 4 : 0),
        values_(d, A(1)) {}

  const A* row(int64_t i) {
    if (drops_) {
      const int64_t d = values_.size();
      const uint32_t* words = words_.data();
      A* values = values_.data();
      fill_words(words_.data(), seed_, uint32_t(i), kDropoutStream, 0, d);
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) values[j] = philox_uniform(words[j]) >= p_ ? scale_ : A(0);
    }
    return values_.data();
  }

 private:
  bool drops_;
  uint64_t seed_;
  float p_;
  A scale_;
  std::vector<uint32_t> words_;
  std::vector<A> values_;
};

// z = x ⊙ ω + k ⊙ (f + b); returns its sum.
template <typename T, typename A>
A residual_sum(A* __restrict z, const T* __restrict x, const T* __restrict f, const A* __restrict omega,
               const A* __restrict branch_bias, const A* __restrict keep, int64_t d) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) {
    z[i] = static_cast<A>(x[i]) * omega[i] + (static_cast<A>(f[i]) + branch_bias[i]) * keep[i];
    sum += z[i];
  }
  return sum;
}

template <typename A>
A squared_distance(const A* z, A mean, int64_t d) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) sum += (z[i] - mean) * (z[i] - mean);
  return sum;
}

template <typename T, typename A>
void affine(T* __restrict y, const A* __restrict z, const A* __restrict weight, const A* __restrict bias, A mean,
            A rstd, int64_t d) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) y[i] = static_cast<T>((z[i] - mean) * rstd * weight[i] + bias[i]);
}

template <typename T>
void prefetch(const T* row, int64_t d) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < d * int64_t(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

template <typename T>
void forward(Tensor& y_tensor, Tensor& mean, Tensor& rstd, const Tensor& x_tensor, const Tensor& branch,
             const MaybeTensor& omega_tensor, const MaybeTensor& weight_tensor, const MaybeTensor& bias_tensor,
             const MaybeTensor& branch_bias_tensor, const MaybeTensor& seed, double dropout, double eps, bool center) {
  using A = typename Arithmetic<T>::type;
  const Rows<T> y_rows(y_tensor), x_rows(x_tensor), f_rows(branch);
  const int64_t n = x_rows.rows, d = x_rows.columns;
  const std::vector<A> omega = parameter(omega_tensor, d, A(1)), weight = parameter(weight_tensor, d, A(1)),
                       bias = parameter(bias_tensor, d, A(0)), branch_bias = parameter(branch_bias_tensor, d, A(0));
  torch::stable::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    Keep<A> keep(seed, dropout, d);
    std::vector<A> buffer(d);
    A* z = buffer.data();
    for (int64_t row = begin; row < end; ++row) {
      const int64_t next = std::min(row + 1, n - 1);
      prefetch(x_rows.row(next), d);
      prefetch(f_rows.row(next), d);
      const A sum =
          residual_sum(z, x_rows.row(row), f_rows.row(row), omega.data(), branch_bias.data(), keep.row(row), d);
      const A mu = center ? sum / d : A(0);
      const A r = 1 / std::sqrt(squared_distance(z, mu, d) / d + A(eps));
      affine(y_rows.row(row), z, weight.data(), bias.data(), mu, r, d);
      static_cast<A*>(mean.data_ptr())[row] = mu;
      static_cast<A*>(rstd.data_ptr())[row] = r;
    }
  });
}

// The parameters' gradients: each block of rows adds to rows of its own, which are then added up in block order.
template <typename A>
class ParameterSums {
 public:
  enum Sum { kOmega, kWeight, kBias, kBranchBias, kCount };

  ParameterSums(int64_t rows, int64_t d)
      : rows_(rows),
        d_(d),
        step_(std::max(kMinRows, (rows + kMaxBlocks - 1) / kMaxBlocks)),
        partial_(blocks() * kCount * d) {}

  int64_t blocks() const { return (rows_ + step_ - 1) / step_; }
  int64_t first_row(int64_t block) const { return std::min(rows_, block * step_); }
  A* of(int64_t block, Sum which) { return partial_.data() + (block * kCount + which) * d_; }

  void write(const MaybeTensor& gradient, Sum which) {
    if (!gradient) return;
    std::vector<double> sum(d_);
    for (int64_t block = 0; block < blocks(); ++block) {
      const A* part = of(block, which);
      for (int64_t i = 0; i < d_; ++i) sum[i] += part[i];
    }
    std::copy(sum.begin(), sum.end(), static_cast<A*>(gradient->data_ptr()));
  }

 private:
  int64_t rows_, d_, step_;
  std::vector<A> partial_;
};

// n = (y − β)/γ.
template <typename T, typename A>
void normalized_from_output(A* __restrict n, const T* __restrict y, const A* __restrict bias,
                            const A* __restrict inverse_weight, int64_t d) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) n[i] = (static_cast<A>(y[i]) - bias[i]) * inverse_weight[i];
}

template <typename T, typename A>
void normalized_from_input(A* __restrict n, const T* x, const T* f, const A* omega, const A* branch_bias,
                           const A* keep, A mean, A rstd, int64_t d) {
  residual_sum(n, x, f, omega, branch_bias, keep, d);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) n[i] = (n[i] - mean) * rstd;
}

// mean(g) and mean(g ⊙ n) of a row, which also adds its share of dγ and dβ.
template <typename T, typename A>
std::pair<A, A> upstream_means(const A* __restrict n, const T* __restrict dy, const A* __restrict weight,
                               A* __restrict grad_weight, A* __restrict grad_bias, int64_t d) {
  A sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < d; ++i) {
    const A upstream = static_cast<A>(dy[i]);
    sum += upstream * weight[i];
    product += upstream * weight[i] * n[i];
    grad_weight[i] += upstream * n[i];
    grad_bias[i] += upstream;
  }
  return {sum / d, product / d};
}

// dx and df of a row, which also adds its share of dω and db.
template <typename T, typename A>
void row_gradients(T* __restrict dx, T* __restrict df, const A* __restrict n, const T* __restrict dy,
                   const T* __restrict x, const A* __restrict weight, const A* __restrict omega,
                   const A* __restrict keep, A* __restrict grad_omega, A* __restrict grad_branch_bias, A rstd, A c1,
                   A c2, int64_t d) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) {
    const A dz = rstd * (static_cast<A>(dy[i]) * weight[i] - c1 - c2 * n[i]), branch = dz * keep[i];
    dx[i] = static_cast<T>(dz * omega[i]);
    df[i] = static_cast<T>(branch);
    grad_omega[i] += dz * static_cast<A>(x[i]);
    grad_branch_bias[i] += branch;
  }
}

// The rows of an optional matrix; where it is absent, one row of zeros that stands in for each.
template <typename T>
class MaybeRows {
 public:
  MaybeRows(const MaybeTensor& t, int64_t d) : stand_in_(t ? 0 : d, T(0)) {
    if (t) rows_.emplace(*t);
  }
  T* row(int64_t i) { return rows_ ? rows_->row(i) : stand_in_.data(); }

 private:
  std::optional<Rows<T>> rows_;
  std::vector<T> stand_in_;
};

template <typename T>
void backward(Tensor& grad_x, const MaybeTensor& grad_branch, const MaybeTensor& grad_omega,
              const MaybeTensor& grad_weight, const MaybeTensor& grad_bias, const MaybeTensor& grad_branch_bias,
              const Tensor& grad_y, const MaybeTensor& y, const MaybeTensor& x, const MaybeTensor& branch,
              const MaybeTensor& omega_tensor, const MaybeTensor& weight_tensor, const MaybeTensor& bias_tensor,
              const MaybeTensor& branch_bias_tensor, const MaybeTensor& seed, const MaybeTensor& mean_tensor,
              const Tensor& rstd_tensor, double dropout, bool center) {
  using A = typename Arithmetic<T>::type;
  using Sums = ParameterSums<A>;
  const Rows<T> dy_rows(grad_y), dx_rows(grad_x);
  const int64_t rows = dy_rows.rows, d = dy_rows.columns;
  const std::vector<A> omega = parameter(omega_tensor, d, A(1)), weight = parameter(weight_tensor, d, A(1)),
                       bias = parameter(bias_tensor, d, A(0)), branch_bias = parameter(branch_bias_tensor, d, A(0));
  std::vector<A> inverse_weight(d);  // 0 where γ is 0 and y says nothing of n
  for (int64_t i = 0; i < d; ++i) inverse_weight[i] = weight[i] == 0 ? A(0) : 1 / weight[i];
  const A* mean = mean_tensor ? static_cast<const A*>(mean_tensor->data_ptr()) : nullptr;
  const A* rstd = static_cast<const A*>(rstd_tensor.data_ptr());
  Sums sums(rows, d);

  torch::stable::parallel_for(0, sums.blocks(), 1, [&](int64_t begin, int64_t end) {
    MaybeRows<T> df_rows(grad_branch, d), y_rows(y, d), x_rows(x, d), f_rows(branch, d);
    Keep<A> keep_rows(seed, dropout, d);
    std::vector<A> buffer(d);
    A* n = buffer.data();
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t row = sums.first_row(block); row < sums.first_row(block + 1); ++row) {
        const A *keep = keep_rows.row(row), r = rstd[row];
        const T *dy = dy_rows.row(row), *x_row = x_rows.row(row);
        const int64_t next = std::min(row + 1, rows - 1);
        prefetch(dy_rows.row(next), d);
        if (y) prefetch(y_rows.row(next), d);
        prefetch(x_rows.row(next), d);
        if (y) {
          normalized_from_output(n, y_rows.row(row), bias.data(), inverse_weight.data(), d);
        } else {
          normalized_from_input(n, x_row, f_rows.row(row), omega.data(), branch_bias.data(), keep, mean[row], r, d);
        }
        const auto [c1, c2] = upstream_means(n, dy, weight.data(), sums.of(block, Sums::kWeight),
                                             sums.of(block, Sums::kBias), d);
        row_gradients(dx_rows.row(row), df_rows.row(row), n, dy, x_row, weight.data(), omega.data(), keep,
                      sums.of(block, Sums::kOmega), sums.of(block, Sums::kBranchBias), r, center ? c1 : A(0), c2, d);
      }
    }
  });
  sums.write(grad_omega, Sums::kOmega);
  sums.write(grad_weight, Sums::kWeight);
  sums.write(grad_bias, Sums::kBias);
  sums.write(grad_branch_bias, Sums::kBranchBias);
}

std::tuple<Tensor, Tensor, Tensor> admin_norm_forward(const Tensor& x, const Tensor& branch, const MaybeTensor& omega,
                                                      const MaybeTensor& weight, const MaybeTensor& bias,
                                                      const MaybeTensor& branch_bias, const MaybeTensor& seed,
                                                      double dropout, double eps, bool center) {
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t n = x.size(0);
  Tensor y = torch::stable::new_empty(x, {n, x.size(1)});
  Tensor mean = torch::stable::new_empty(x, {n}, type), rstd = torch::stable::new_empty(x, {n}, type);
  advise_huge_pages(y);
  dispatch_floating(x.scalar_type(), "admin_norm_forward", [&](auto t) {
    forward<decltype(t)>(y, mean, rstd, x, branch, omega, weight, bias, branch_bias, seed, dropout, eps, center);
  });
  return {y, mean, rstd};
}

void admin_norm_backward(Tensor grad_x, MaybeTensor grad_branch, MaybeTensor grad_omega, MaybeTensor grad_weight,
                         MaybeTensor grad_bias, MaybeTensor grad_branch_bias, const Tensor& grad_y,
                         const MaybeTensor& y, const MaybeTensor& x, const MaybeTensor& branch,
                         const MaybeTensor& omega, const MaybeTensor& weight, const MaybeTensor& bias,
                         const MaybeTensor& branch_bias, const MaybeTensor& seed, const MaybeTensor& mean,
                         const Tensor& rstd, double dropout, bool center) {
  advise_huge_pages(grad_x);
  if (grad_branch) advise_huge_pages(*grad_branch);
  dispatch_floating(grad_y.scalar_type(), "admin_norm_backward", [&](auto t) {
    backward<decltype(t)>(grad_x, grad_branch, grad_omega, grad_weight, grad_bias, grad_branch_bias, grad_y, y, x,
                          branch, omega, weight, bias, branch_bias, seed, mean, rstd, dropout, center);
  });
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("admin_norm_forward", TORCH_BOX(&repdeg_fast::admin_norm_forward));
  m.impl("admin_norm_backward", TORCH_BOX(&repdeg_fast::admin_norm_backward));
}
