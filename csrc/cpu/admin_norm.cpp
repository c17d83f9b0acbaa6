// ADMIN's residual block on the CPU. Mathematics: repdeg_fast/reference/admin_norm.py.
//
// Bandwidth-bound: forward must read x and the branch once and write y once; backward must read dy and y (and x, for
// dω) once and write dx and df once. Each row is brought into L1 once and all its passes run there. Parameters lie in
// L1 too, absent ones as ones or zeros, so that one loop serves every combination; a dropout mask is drawn into a
// row's buffer, vectorized, and so are rows of 16-bit values converted. Sums over rows are taken within fixed blocks
// of rows, then over the blocks in order.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "noise.h"
#include "rows.h"
#include "vector_math.h"

namespace repdeg_fast {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMaxBlocks = 128;  // partial sums: at most this many rows of d for each parameter
constexpr int64_t kMinRows = 32;     // a block
constexpr int64_t kRun = 1024;       // values of a row added up in their own precision; runs are in double

// A parameter's d values, where they lie; `absent` throughout where it is not given.
template <typename A>
class Parameter {
 public:
  Parameter(const MaybeTensor& given, int64_t d, A absent)
      : absent_(given ? 0 : d, absent), data_(given ? static_cast<const A*>(given->data_ptr()) : absent_.data()) {}
  const A* data() const { return data_; }
  A operator[](int64_t i) const { return data_[i]; }

 private:
  Buffer<A> absent_;
  const A* data_;
};

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
  Buffer<uint32_t> words_;
  Buffer<A> values_;
};

// The rows of a matrix as arithmetic values: in place where they already are, else converted into a row's buffer. Rows
// of zeros where there is no matrix.
template <typename T>
class InputRows {
 public:
  using A = typename Arithmetic<T>::type;
  InputRows(const MaybeTensor& t, int64_t d) : buffer_(t && std::is_same_v<T, A> ? 0 : d, A(0)), d_(d) {
    if (t) rows_.emplace(*t);
  }

  const A* row(int64_t i) {
    if (!rows_) return buffer_.data();
    const T* row = rows_->row(i);
    if constexpr (std::is_same_v<T, A>) {
      return row;
    } else {
      constexpr int64_t L = Vector<A>::lanes;
      int64_t j = 0;
      for (; j + L <= d_; j += L) store(buffer_.data() + j, load_values(row + j));
      for (; j < d_; ++j) buffer_[j] = static_cast<A>(row[j]);
      return buffer_.data();
    }
  }

  // Hardware stops fetching ahead at the end of a page, and rows of several matrices take turns.
  void prefetch(int64_t i) const {
    if (!rows_ || i >= rows_->rows) return;
    const char* bytes = reinterpret_cast<const char*>(rows_->row(i));
    for (int64_t j = 0; j < d_ * int64_t(sizeof(T)); j += 64) __builtin_prefetch(bytes + j, 0, 2);
  }

 private:
  std::optional<Rows<T>> rows_;
  Buffer<A> buffer_;
  int64_t d_;
};

// Where the rows of a matrix are to be written, as arithmetic values: write to row(i), then store(i). Nowhere, if there
// is no matrix.
template <typename T>
class OutputRows {
 public:
  using A = typename Arithmetic<T>::type;
  OutputRows(const MaybeTensor& t, int64_t d) : buffer_(t && std::is_same_v<T, A> ? 0 : d), d_(d) {
    if (t) rows_.emplace(*t);
  }

  A* row(int64_t i) {
    if constexpr (std::is_same_v<T, A>) {
      if (rows_) return rows_->row(i);
    }
    return buffer_.data();
  }

  void store(int64_t i) {
    if constexpr (!std::is_same_v<T, A>) {
      if (!rows_) return;
      constexpr int64_t L = Vector<A>::lanes;
      T* row = rows_->row(i);
      int64_t j = 0;
      for (; j + L <= d_; j += L) store_values(row + j, load(buffer_.data() + j));
      for (; j < d_; ++j) row[j] = static_cast<T>(buffer_[j]);
    }
  }

 private:
  std::optional<Rows<T>> rows_;
  Buffer<A> buffer_;
  int64_t d_;
};

// z = x ⊙ ω + k ⊙ (f + b); returns its sum.
template <typename A>
A residual_sum(A* __restrict z, const A* __restrict x, const A* __restrict f, const A* __restrict omega,
               const A* __restrict branch_bias, const A* __restrict keep, int64_t d) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) {
    z[i] = x[i] * omega[i] + (f[i] + branch_bias[i]) * keep[i];
    sum += z[i];
  }
  return sum;
}

// Σ (z − origin) and Σ (z − origin)². Both halves of a run at once: one addition need not wait for the other.
template <typename A>
std::pair<double, double> deviations(const A* z, A origin, int64_t d) {
  double sum = 0, squares = 0;
  for (int64_t first = 0; first < d; first += kRun) {
    const int64_t values = std::min(kRun, d - first), half = values / 2;
    const A *left = z + first, *right = left + half;
    const A odd = values % 2 ? left[values - 1] - origin : A(0);
    A left_sum = 0, left_squares = 0, right_sum = 0, right_squares = 0;
#pragma omp simd reduction(+ : left_sum, left_squares, right_sum, right_squares)
    for (int64_t i = 0; i < half; ++i) {
      const A l = left[i] - origin, r = right[i] - origin;
      left_sum += l;
      left_squares += l * l;
      right_sum += r;
      right_squares += r * r;
    }
    sum += left_sum + right_sum + odd;
    squares += left_squares + right_squares + odd * odd;
  }
  return {sum, squares};
}

template <typename A>
void affine(A* __restrict y, const A* __restrict z, const A* __restrict weight, const A* __restrict bias, A mean,
            A rstd, int64_t d) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) y[i] = (z[i] - mean) * rstd * weight[i] + bias[i];
}

template <typename T>
void forward(Tensor& y_tensor, Tensor& mean, Tensor& rstd, const Tensor& x_tensor, const Tensor& branch,
             const MaybeTensor& omega_tensor, const MaybeTensor& weight_tensor, const MaybeTensor& bias_tensor,
             const MaybeTensor& branch_bias_tensor, const MaybeTensor& seed, double dropout, double eps, bool center) {
  using A = typename Arithmetic<T>::type;
  const int64_t n = x_tensor.size(0), d = x_tensor.size(1);
  const Parameter<A> omega(omega_tensor, d, 1), weight(weight_tensor, d, 1), bias(bias_tensor, d, 0),
      branch_bias(branch_bias_tensor, d, 0);
  A *means = static_cast<A*>(mean.data_ptr()), *rstds = static_cast<A*>(rstd.data_ptr());
  torch::stable::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    InputRows<T> x_rows(x_tensor, d), f_rows(branch, d);
    OutputRows<T> y_rows(y_tensor, d);
    Keep<A> keep(seed, dropout, d);
    Buffer<A> z(d);
    for (int64_t row = begin; row < end; ++row) {
      x_rows.prefetch(row + 1);
      f_rows.prefetch(row + 1);
      const A sum = residual_sum(z.data(), x_rows.row(row), f_rows.row(row), omega.data(), branch_bias.data(),
                                 keep.row(row), d);
      // The first mean has lost digits where the row is far from zero; the mean of what is left around it has them.
      const A origin = center ? sum / d : A(0);
      const auto [deviation, squares] = deviations(z.data(), origin, d);
      const double shift = center ? deviation / d : 0;
      const A mu = A(origin + shift), r = A(1 / std::sqrt(std::max(squares / d - shift * shift, 0.0) + eps));
      affine(y_rows.row(row), z.data(), weight.data(), bias.data(), mu, r, d);
      y_rows.store(row);
      means[row] = mu;
      rstds[row] = r;
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

  // Nothing, if there is no gradient.
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
  Buffer<A> partial_;
};

// n = (y − β)/γ.
template <typename A>
void normalized_from_output(A* __restrict n, const A* __restrict y, const A* __restrict bias,
                            const A* __restrict inverse_weight, int64_t d) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) n[i] = (y[i] - bias[i]) * inverse_weight[i];
}

template <typename A>
void normalized_from_input(A* __restrict n, const A* x, const A* f, const A* omega, const A* branch_bias,
                           const A* keep, A mean, A rstd, int64_t d) {
  residual_sum(n, x, f, omega, branch_bias, keep, d);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) n[i] = (n[i] - mean) * rstd;
}

// mean(g) and mean(g ⊙ n) of a row, which also adds its share of dγ and dβ.
template <typename A>
std::pair<A, A> upstream_means(const A* __restrict n, const A* __restrict dy, const A* __restrict weight,
                               A* __restrict grad_weight, A* __restrict grad_bias, int64_t d) {
  double sum = 0, product = 0;
  for (int64_t first = 0; first < d; first += kRun) {
    const int64_t last = std::min(first + kRun, d);
    A run_sum = 0, run_product = 0;
#pragma omp simd reduction(+ : run_sum, run_product)
    for (int64_t i = first; i < last; ++i) {
      run_sum += dy[i] * weight[i];
      run_product += dy[i] * weight[i] * n[i];
      grad_weight[i] += dy[i] * n[i];
      grad_bias[i] += dy[i];
    }
    sum += run_sum;
    product += run_product;
  }
  return {A(sum / d), A(product / d)};
}

// dx and df of a row, which also adds its share of dω and db.
template <typename A>
void row_gradients(A* __restrict dx, A* __restrict df, const A* __restrict n, const A* __restrict dy,
                   const A* __restrict x, const A* __restrict weight, const A* __restrict omega,
                   const A* __restrict keep, A* __restrict grad_omega, A* __restrict grad_branch_bias, A rstd, A c1,
                   A c2, int64_t d) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) {
    const A dz = rstd * (dy[i] * weight[i] - c1 - c2 * n[i]), branch = dz * keep[i];
    dx[i] = dz * omega[i];
    df[i] = branch;
    grad_omega[i] += dz * x[i];
    grad_branch_bias[i] += branch;
  }
}

// Made where wanted, else not there.
struct Gradients {
  Tensor x;
  MaybeTensor branch, omega, weight, bias, branch_bias;
};

template <typename T>
void backward(const Gradients& gradients, const Tensor& grad_y, const MaybeTensor& y, const MaybeTensor& x,
              const MaybeTensor& branch, const MaybeTensor& omega_tensor, const MaybeTensor& weight_tensor,
              const MaybeTensor& bias_tensor, const MaybeTensor& branch_bias_tensor, const MaybeTensor& seed,
              const MaybeTensor& mean_tensor, const Tensor& rstd_tensor, double dropout, bool center) {
  using A = typename Arithmetic<T>::type;
  using Sums = ParameterSums<A>;
  const int64_t rows = grad_y.size(0), d = grad_y.size(1);
  const Parameter<A> omega(omega_tensor, d, 1), weight(weight_tensor, d, 1), bias(bias_tensor, d, 0),
      branch_bias(branch_bias_tensor, d, 0);
  Buffer<A> inverse_weight(d);  // 0 where γ is 0 and y says nothing of n
  for (int64_t i = 0; i < d; ++i) inverse_weight[i] = weight[i] == 0 ? A(0) : 1 / weight[i];
  const A* mean = mean_tensor ? static_cast<const A*>(mean_tensor->data_ptr()) : nullptr;
  const A* rstd = static_cast<const A*>(rstd_tensor.data_ptr());
  Sums sums(rows, d);

  torch::stable::parallel_for(0, sums.blocks(), 1, [&](int64_t begin, int64_t end) {
    InputRows<T> dy_rows(grad_y, d), y_rows(y, d), x_rows(x, d), f_rows(branch, d);
    OutputRows<T> dx_rows(gradients.x, d), df_rows(gradients.branch, d);
    Keep<A> keep_rows(seed, dropout, d);
    Buffer<A> n(d);
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t row = sums.first_row(block); row < sums.first_row(block + 1); ++row) {
        for (const auto* input : {&dy_rows, &y_rows, &x_rows, &f_rows}) input->prefetch(row + 1);
        const A *keep = keep_rows.row(row), *dy_row = dy_rows.row(row), *x_row = x_rows.row(row), r = rstd[row];
        if (y) {
          normalized_from_output(n.data(), y_rows.row(row), bias.data(), inverse_weight.data(), d);
        } else {
          normalized_from_input(n.data(), x_row, f_rows.row(row), omega.data(), branch_bias.data(), keep, mean[row], r,
                                d);
        }
        const auto [c1, c2] = upstream_means(n.data(), dy_row, weight.data(), sums.of(block, Sums::kWeight),
                                             sums.of(block, Sums::kBias), d);
        row_gradients(dx_rows.row(row), df_rows.row(row), n.data(), dy_row, x_row, weight.data(), omega.data(), keep,
                      sums.of(block, Sums::kOmega), sums.of(block, Sums::kBranchBias), r, center ? c1 : A(0), c2, d);
        dx_rows.store(row);
        df_rows.store(row);
      }
    }
  });
  sums.write(gradients.omega, Sums::kOmega);
  sums.write(gradients.weight, Sums::kWeight);
  sums.write(gradients.bias, Sums::kBias);
  sums.write(gradients.branch_bias, Sums::kBranchBias);
}

std::tuple<Tensor, Tensor, Tensor> admin_norm_forward(const Tensor& x, const Tensor& branch, const MaybeTensor& omega,
                                                      const MaybeTensor& weight, const MaybeTensor& bias,
                                                      const MaybeTensor& branch_bias, const MaybeTensor& seed,
                                                      double dropout, double eps, bool center) {
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t n = x.size(0);
  Tensor y = empty({n, x.size(1)}, x.scalar_type()), mean = empty({n}, type), rstd = empty({n}, type);
  advise_huge_pages(y);
  dispatch_floating(x.scalar_type(), "admin_norm_forward", [&](auto t) {
    forward<decltype(t)>(y, mean, rstd, x, branch, omega, weight, bias, branch_bias, seed, dropout, eps, center);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> admin_norm_backward(
    const Tensor& grad_y, const MaybeTensor& y, const MaybeTensor& x, const MaybeTensor& branch,
    const MaybeTensor& omega, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& branch_bias,
    const MaybeTensor& seed, const MaybeTensor& mean, const Tensor& rstd, double dropout, bool center,
    bool wants_branch, bool wants_omega, bool wants_weight, bool wants_bias, bool wants_branch_bias) {
  const int64_t n = grad_y.size(0), d = grad_y.size(1);
  const auto matrix = [&] {
    const Tensor t = empty({n, d}, grad_y.scalar_type());
    advise_huge_pages(t);
    return t;
  };
  const auto parameter = [&](bool wanted) { return wanted ? MaybeTensor(empty({d}, rstd.scalar_type())) : std::nullopt; };
  const Gradients made{matrix(),
                       wants_branch ? MaybeTensor(matrix()) : std::nullopt,
                       parameter(wants_omega),
                       parameter(wants_weight),
                       parameter(wants_bias),
                       parameter(wants_branch_bias)};
  dispatch_floating(grad_y.scalar_type(), "admin_norm_backward", [&](auto t) {
    backward<decltype(t)>(made, grad_y, y, x, branch, omega, weight, bias, branch_bias, seed, mean, rstd, dropout,
                          center);
  });
  const auto or_empty = [&](const MaybeTensor& t) { return t ? *t : empty({0}, rstd.scalar_type()); };
  return {made.x,
          made.branch ? *made.branch : empty({0}, grad_y.scalar_type()),
          or_empty(made.omega),
          or_empty(made.weight),
          or_empty(made.bias),
          or_empty(made.branch_bias)};
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("admin_norm_forward", TORCH_BOX(&repdeg_fast::admin_norm_forward));
  m.impl("admin_norm_backward", TORCH_BOX(&repdeg_fast::admin_norm_backward));
}
