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

// A parameter of d values in arithmetic type; `absent` throughout where it is not given. Any stride: 0 is a scalar ω.
template <typename A>
std::vector<A> parameter(const MaybeTensor& given, int64_t d, A absent) {
  std::vector<A> values(d, absent);
  if (given) {
    const A* data = static_cast<const A*>(given->data_ptr());
    for (int64_t i = 0; i < d; ++i) values[i] = data[i * given->stride(0)];
  }
  return values;
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
A residual_sum(A* __restrict z, const T* x, const T* f, const A* omega, const A* branch_bias, const A* keep,
               int64_t d) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) {
    z[i] = static_cast<A>(x[i]) * omega[i] + (static_cast<A>(f[i]) + branch_bias[i]) * keep[i];
    sum += z[i];
  }
  return sum;
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
      const A sum =
          residual_sum(z, x_rows.row(row), f_rows.row(row), omega.data(), branch_bias.data(), keep.row(row), d);
      const A mu = center ? sum / d : A(0);
      A square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t i = 0; i < d; ++i) square += (z[i] - mu) * (z[i] - mu);
      const A r = 1 / std::sqrt(square / d + A(eps));
      T* __restrict y = y_rows.row(row);
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) y[i] = static_cast<T>((z[i] - mu) * r * weight[i] + bias[i]);
      static_cast<A*>(mean.data_ptr())[row] = mu;
      static_cast<A*>(rstd.data_ptr())[row] = r;
    }
  });
}

// The parameters' gradients: each block of rows adds to rows of its own, which are then added up in block order.
template <typename A>
class ParameterSums {
 public:
  ParameterSums(int64_t rows, int64_t d)
      : d_(d), step_(std::max(kMinRows, (rows + kMaxBlocks - 1) / kMaxBlocks)), blocks_((rows + step_ - 1) / step_) {
    partial_.assign(blocks_ * kCount * d, A(0));
  }
  enum Sum { kOmega, kWeight, kBias, kBranchBias, kCount };

  int64_t blocks() const { return blocks_; }
  int64_t rows_per_block() const { return step_; }
  A* of_block(int64_t block, Sum which) { return partial_.data() + (block * kCount + which) * d_; }

  void write(const MaybeTensor& gradient, Sum which) {
    if (!gradient) return;
    std::vector<double> sum(d_);
    for (int64_t block = 0; block < blocks_; ++block) {
      const A* part = of_block(block, which);
      for (int64_t i = 0; i < d_; ++i) sum[i] += part[i];
    }
    std::copy(sum.begin(), sum.end(), static_cast<A*>(gradient->data_ptr()));
  }

 private:
  int64_t d_, step_, blocks_;
  std::vector<A> partial_;
};

template <typename T>
struct Backward {
  using A = typename Arithmetic<T>::type;
  using Sums = ParameterSums<A>;

  int64_t d;
  bool center;
  std::vector<A> omega, weight, inverse_weight, bias, branch_bias;

  // n = (y − β)/γ; 0 where γ is 0, which says nothing of n.
  void normalized_from_output(A* __restrict n, const T* y) const {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) n[i] = (static_cast<A>(y[i]) - bias[i]) * inverse_weight[i];
  }

  void normalized_from_input(A* __restrict n, const T* x, const T* f, const A* keep, A mean, A rstd) const {
    residual_sum(n, x, f, omega.data(), branch_bias.data(), keep, d);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) n[i] = (n[i] - mean) * rstd;
  }

  // From n and dy of one row: dz over n, and the row's share of dγ and dβ.
  void normalization(A* __restrict n, const T* dy, A rstd, A* __restrict grad_weight, A* __restrict grad_bias) const {
    A sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t i = 0; i < d; ++i) {
      const A upstream = static_cast<A>(dy[i]), g = upstream * weight[i];
      sum += g;
      product += g * n[i];
      grad_weight[i] += upstream * n[i];
      grad_bias[i] += upstream;
    }
    const A c1 = center ? sum / d : A(0), c2 = product / d;
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) n[i] = rstd * (static_cast<A>(dy[i]) * weight[i] - c1 - c2 * n[i]);
  }
};

// dx = dz ⊙ ω, df = dz ⊙ k (where it differs), and the row's share of dω (where asked for) and db.
template <typename T, typename A>
void residual_gradients(T* __restrict dx, T* __restrict df, const A* dz, const T* x, const A* omega, const A* keep,
                        A* __restrict grad_omega, A* __restrict grad_branch_bias, int64_t d) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) dx[i] = static_cast<T>(dz[i] * omega[i]);
  if (x) {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) grad_omega[i] += dz[i] * static_cast<A>(x[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) grad_branch_bias[i] += dz[i] * keep[i];
  if (df) {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) df[i] = static_cast<T>(dz[i] * keep[i]);
  }
}

// A row of an optional matrix, or null.
template <typename T>
struct MaybeRows {
  std::optional<Rows<T>> rows;
  explicit MaybeRows(const MaybeTensor& t) {
    if (t) rows.emplace(*t);
  }
  T* row(int64_t i) const { return rows ? rows->row(i) : nullptr; }
};

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
  dispatch_floating(grad_y.scalar_type(), "admin_norm_backward", [&](auto type) {
    using T = decltype(type);
    using A = typename Arithmetic<T>::type;
    using Sums = ParameterSums<A>;
    const Rows<T> dy_rows(grad_y), dx_rows(grad_x);
    const MaybeRows<T> df_rows(grad_branch), y_rows(y), x_rows(x), f_rows(branch);
    const int64_t n_rows = dy_rows.rows, d = dy_rows.columns;
    Backward<T> row_of{d,
                       center,
                       parameter(omega, d, A(1)),
                       parameter(weight, d, A(1)),
                       {},
                       parameter(bias, d, A(0)),
                       parameter(branch_bias, d, A(0))};
    for (A value : row_of.weight) row_of.inverse_weight.push_back(value == 0 ? A(0) : 1 / value);
    const A* means = mean ? static_cast<const A*>(mean->data_ptr()) : nullptr;
    const A* rstds = static_cast<const A*>(rstd.data_ptr());
    Sums sums(n_rows, d);

    torch::stable::parallel_for(0, sums.blocks(), 1, [&](int64_t begin, int64_t end) {
      Keep<A> keep_of(seed, dropout, d);
      std::vector<A> buffer(d);
      A* n = buffer.data();
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * sums.rows_per_block(), last = std::min(n_rows, first + sums.rows_per_block());
        for (int64_t row = first; row < last; ++row) {
          const A* keep = keep_of.row(row);
          const T* x_row = x_rows.row(row);
          if (y) {
            row_of.normalized_from_output(n, y_rows.row(row));
          } else {
            row_of.normalized_from_input(n, x_row, f_rows.row(row), keep, means[row], rstds[row]);
          }
          row_of.normalization(n, dy_rows.row(row), rstds[row], sums.of_block(block, Sums::kWeight),
                               sums.of_block(block, Sums::kBias));
          residual_gradients(dx_rows.row(row), df_rows.row(row), n, grad_omega ? x_row : nullptr, row_of.omega.data(),
                             keep, sums.of_block(block, Sums::kOmega), sums.of_block(block, Sums::kBranchBias), d);
        }
      }
    });
    sums.write(grad_omega, Sums::kOmega);
    sums.write(grad_weight, Sums::kWeight);
    sums.write(grad_bias, Sums::kBias);
    sums.write(grad_branch_bias, Sums::kBranchBias);
  });
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("admin_norm_forward", TORCH_BOX(&repdeg_fast::admin_norm_forward));
  m.impl("admin_norm_backward", TORCH_BOX(&repdeg_fast::admin_norm_backward));
}
