// CosReg on the CPU. Mathematics: repdeg_fast/reference/cosreg.py.
//
// Bandwidth-bound: forward must read W once (N·d), backward must read W and write its gradient once. Each row is
// therefore brought into L1 once and used twice there: for its norm (or its product with the column sum), then for
// its share of the result. Four rows at a time share one pass over the column sum.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "rows.h"

namespace repdeg_fast {
namespace {

constexpr int64_t kGroup = 4;  // rows that share one pass over the column sum

// Enough blocks for any number of cores, and no more rows in one than fp32 adds up well; the blocks' sums are added in
// double.
int64_t rows_per_block(int64_t rows) {
  const int64_t even = (rows / 128 + kGroup) / kGroup * kGroup;
  return std::clamp<int64_t>(even, 64, 1024);
}

// ‖x‖; NaN where its square overflows. Squares of tiny values would be lost: those rows are looked at again, enlarged.
template <typename A>
A norm(const A* x, int64_t d) {
  constexpr A kEnlarge = A(0x1p64), kTiny = A(0x1p-96);
  const A squared = dot(x, x, d);
  if (std::isinf(squared)) return std::numeric_limits<A>::quiet_NaN();
  if (!(squared < kTiny)) return std::sqrt(squared);
  A enlarged = 0;
  for (int64_t i = 0; i < d; ++i) enlarged += (x[i] * kEnlarge) * (x[i] * kEnlarge);
  return std::sqrt(enlarged) / kEnlarge;
}

template <typename A>
void add_rows(A* sum, const A* const* x, const A* coefficient, int64_t d) {
  constexpr int64_t L = Vector<A>::lanes;
  int64_t i = 0;
  for (; i + L <= d; i += L) {
    auto v = load(sum + i);
    for (int64_t k = 0; k < kGroup; ++k) v += coefficient[k] * load(x[k] + i);
    store(sum + i, v);
  }
  for (; i < d; ++i)
    for (int64_t k = 0; k < kGroup; ++k) sum[i] += coefficient[k] * x[k][i];
}

// The rows [begin, end): their part of Σ p ŵ into `sum`; returns their part of Σ p²‖ŵ‖².
template <typename T, typename A>
double forward_block(const Rows<T>& weight, const A* p, A eps, int64_t begin, int64_t end, A* sum, A* inverse,
                     std::vector<A>& buffer) {
  const int64_t d = weight.columns;
  std::fill(sum, sum + d, A(0));
  double self = 0;
  for (int64_t first = begin; first < end; first += kGroup) {
    const A* x[kGroup];
    A coefficient[kGroup];
    for (int64_t k = 0; k < kGroup; ++k) {
      const int64_t i = std::min(first + k, end - 1);  // beyond the end: the last row again, times 0
      x[k] = read_row(weight.row(i), weight.column_stride, d, buffer.data() + k * d);
      coefficient[k] = 0;
      if (first + k >= end) continue;
      const A length = norm(x[k], d), inv = length == 0 ? 0 : 1 / std::max(length, eps);  // max(NaN, eps) is NaN
      inverse[i] = inv;
      const A weight_i = p ? p[i] : A(1);
      coefficient[k] = weight_i * inv;
      // ‖ŵ‖² is 1 by definition, and less only where eps is what divides
      const double unit = inv == 0 ? 0 : (inv * eps < 1 ? 1 : double(length) * inv);
      self += double(weight_i) * weight_i * unit * unit;
    }
    add_rows(sum, x, coefficient, d);
  }
  return self;
}

template <typename T>
void forward(const Tensor& weight_tensor, const std::optional<Tensor>& row_weight, double eps, Tensor& value,
             Tensor& column_sum, Tensor& inverse, Tensor& total_weight) {
  using A = typename Arithmetic<T>::type;
  const Rows<T> weight(weight_tensor);
  const int64_t n = weight.rows, d = weight.columns, step = rows_per_block(n), blocks = (n + step - 1) / step;
  const A* p = row_weight ? static_cast<const A*>(row_weight->data_ptr()) : nullptr;
  Tensor partial_tensor = torch::stable::new_empty(column_sum, {blocks, d});
  A* partial = static_cast<A*>(partial_tensor.data_ptr());
  std::vector<double> self(blocks);

  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> buffer(kGroup * d);
    for (int64_t b = begin; b < end; ++b)
      self[b] = forward_block(weight, p, A(eps), b * step, std::min(n, (b + 1) * step), partial + b * d,
                              static_cast<A*>(inverse.data_ptr()), buffer);
  });

  double total = double(n), square = 0, self_sum = 0;
  if (p) {
    total = 0;
    for (int64_t i = 0; i < n; ++i) total += p[i];
  }
  for (int64_t b = 0; b < blocks; ++b) self_sum += self[b];
  std::vector<double> sum(d);
  torch::stable::parallel_for(0, d, 256, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = begin; i < end; ++i) sum[i] += partial[b * d + i];
  });
  A* out = static_cast<A*>(column_sum.data_ptr());
  for (int64_t i = 0; i < d; ++i) {
    out[i] = A(sum[i]);
    square += sum[i] * sum[i];
  }
  *static_cast<A*>(value.data_ptr()) = A((square - self_sum) / (total * total));
  *static_cast<A*>(total_weight.data_ptr()) = A(total);
}

// grad = a·(s − b·x), added to what is there or written over it.
template <typename T, typename A>
void write_gradient(T* out, int64_t stride, const A* s, const A* x, A a, A b, int64_t d, bool accumulate) {
  if constexpr (std::is_same_v<T, A>) {
    if (stride == 1) {
      constexpr int64_t L = Vector<A>::lanes;
      int64_t i = 0;
      for (; i + L <= d; i += L) {
        auto g = a * (load(s + i) - b * load(x + i));
        store(out + i, accumulate ? load(out + i) + g : g);
      }
      for (; i < d; ++i) out[i] = (accumulate ? out[i] : A(0)) + a * (s[i] - b * x[i]);
      return;
    }
  }
  for (int64_t i = 0; i < d; ++i) {
    const A before = accumulate ? static_cast<A>(out[i * stride]) : A(0);
    out[i * stride] = static_cast<T>(before + a * (s[i] - b * x[i]));
  }
}

template <typename T>
void backward(const Tensor& grad_weight, const Tensor& grad_value, const Tensor& weight_tensor,
              const std::optional<Tensor>& row_weight, const Tensor& column_sum, const Tensor& inverse_norm,
              const std::optional<Tensor>& total_weight, double eps, bool accumulate) {
  using A = typename Arithmetic<T>::type;
  const Rows<T> weight(weight_tensor), grad(grad_weight);
  const int64_t n = weight.rows, d = weight.columns;
  const A* p = row_weight ? static_cast<const A*>(row_weight->data_ptr()) : nullptr;
  const A* s = static_cast<const A*>(column_sum.data_ptr());
  const A* inverse = static_cast<const A*>(inverse_norm.data_ptr());
  const double total = total_weight ? double(*static_cast<const A*>(total_weight->data_ptr())) : double(n);
  const A scale = A(2 * double(*static_cast<const A*>(grad_value.data_ptr())) / (total * total));
  const A largest_inverse = A(1 / eps);  // where eps divides, ŵ is linear in w: no projection

  torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    std::vector<A> buffer(d);
    for (int64_t i = begin; i < end; ++i) {
      const A* x = read_row(weight.row(i), weight.column_stride, d, buffer.data());
      const A inv = inverse[i], p_i = p ? p[i] : A(1);
      const A a = scale * p_i * inv;
      const A along = inv < largest_inverse ? dot(s, x, d) * inv : p_i;
      write_gradient(grad.row(i), grad.column_stride, s, x, a, along * inv, d, accumulate);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cosreg_forward(const Tensor& weight, const std::optional<Tensor>& row_weight,
                                                          double eps) {
  const auto type = weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef size) {
    return torch::stable::new_empty(weight, size, type);
  };
  Tensor value = empty({}), column_sum = empty({weight.size(1)}), inverse = empty({weight.size(0)}), total = empty({});
  dispatch_floating(weight.scalar_type(), "cosreg_forward", [&](auto t) {
    forward<decltype(t)>(weight, row_weight, eps, value, column_sum, inverse, total);
  });
  return {value, column_sum, inverse, total};
}

void cosreg_backward(Tensor grad_weight, const Tensor& grad_value, const Tensor& weight,
                     const std::optional<Tensor>& row_weight, const Tensor& column_sum, const Tensor& inverse_norm,
                     const std::optional<Tensor>& total_weight, double eps, bool accumulate) {
  if (!accumulate) advise_huge_pages(grad_weight);
  dispatch_floating(weight.scalar_type(), "cosreg_backward", [&](auto t) {
    backward<decltype(t)>(grad_weight, grad_value, weight, row_weight, column_sum, inverse_norm, total_weight, eps,
                          accumulate);
  });
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("cosreg_forward", TORCH_BOX(&repdeg_fast::cosreg_forward));
  m.impl("cosreg_backward", TORCH_BOX(&repdeg_fast::cosreg_backward));
}
