// The row pass of the linear cross entropy on the CPU. Mathematics: repdeg_fast/reference/linear_cross_entropy.py.
//
// One (R, W) buffer of logits comes from the GEMM and goes to the next GEMM as its gradient. It must be read once and
// written once; a row of it (120 KB at V = 30,522 in fp32) stays in L2 between the three looks that a softmax needs:
// maximum, sum of exponentials, gradient. The bias gradient is a column sum, so a second phase gives each thread
// columns of its own: no atomics, no partial sums, and the same bits with any number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "gemm.h"
#include "softmax.h"

namespace repdeg_fast {
namespace {

struct Settings {
  int64_t vocabulary, first_column, ignore_index;
  double label_smoothing, softcap, gradient_filter;  // the latter two 0: none
};

// z = softcap(logit + bias), into `z`, which may be the logits themselves.
template <typename T, typename A>
void read_logits(const T* logits, const A* bias, A softcap, int64_t n, A* z) {
  constexpr int64_t L = Vector<A>::lanes;
  const A inverse = softcap ? 1 / softcap : A(0);
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    auto v = load_values(logits + i);
    if (bias) v += load(bias + i);
    if (softcap) v = softcap * tanh(v * inverse);
    store(z + i, v);
  }
  for (; i < n; ++i) {
    A v = static_cast<A>(logits[i]);
    if (bias) v += bias[i];
    z[i] = softcap ? softcap * std::tanh(v * inverse) : v;
  }
}

// Of every class, by which Σ y and the smoothed part of y are weighted; `each` null: all weigh 1.
template <typename A>
struct ClassWeight {
  const A* each;
  A total;
};

// What a row's gradient is made of, beside its logits: dz = (softmax·total − smooth·weight)·(1 − (z/softcap)²), and 0
// where the softmax is less than `filter`. The target's own part is added by the caller.
template <typename A>
struct Gradient {
  A total, smooth, inverse_softcap, filter;
  const A* weight;  // of the block's columns, or null
};

template <bool kPlain, typename T, typename A>
void write_gradient(const A* z, Softmax<A> softmax, const Gradient<A>& of, int64_t n, T* out) {
  constexpr int64_t L = Vector<A>::lanes;
  const A scale = of.total / softmax.sum, least = of.filter * softmax.sum;
  const auto gradient = [&](auto v, auto weight) {
    const auto e = exp(v - softmax.origin);
    auto g = scale * e - of.smooth * weight;
    if (of.inverse_softcap) g *= 1 - (v * of.inverse_softcap) * (v * of.inverse_softcap);
    if constexpr (!kPlain) g = e < least ? broadcast(A(0)) : g;  // NaN stays
    return g;
  };
  const auto one = broadcast(A(1));
  int64_t i = 0;
  for (; i + L <= n; i += L)
    store_values(out + i, gradient(load(z + i), !kPlain && of.weight ? load(of.weight + i) : one));
  for (; i < n; ++i)
    out[i] = static_cast<T>(gradient(broadcast(z[i]), !kPlain && of.weight ? broadcast(of.weight[i]) : one)[0]);
}

// Σ weight·(origin − z).
template <typename A>
A weighted_gaps(const A* z, const A* weight, A origin, int64_t n) {
  constexpr int64_t L = Vector<A>::lanes;
  auto sum = broadcast(A(0));
  int64_t i = 0;
  for (; i + L <= n; i += L) sum += load(weight + i) * (origin - load(z + i));
  A total = 0;
  for (int64_t k = 0; k < L; ++k) total += A(sum[k]);
  for (; i < n; ++i) total += weight[i] * (origin - z[i]);
  return total;
}

// The first place of `value`, or 0.
template <typename A>
int64_t first_of(const A* z, A value, int64_t n) {
  constexpr int64_t kBlock = 256;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = std::min(first + kBlock, n);
    bool found = false;
    for (int64_t i = first; i < last; ++i) found |= z[i] == value;  // without a branch: many at a time
    if (found) return std::find(z + first, z + last, value) - z;
  }
  return 0;
}

// out[j] = Σ_r logits[r, j] (+ out[j]), rows in order; `width` columns from `first`.
template <typename T, typename A>
void add_columns(const Rows<T>& rows, int64_t first, int64_t width, bool accumulate, A* out) {
  constexpr int64_t L = Vector<A>::lanes;
  if (!accumulate) std::fill(out + first, out + first + width, A(0));
  for (int64_t r = 0; r < rows.rows; ++r) {
    const T* row = rows.row(r);
    int64_t i = first;
    for (; i + L <= first + width; i += L) store(out + i, load(out + i) + load_values(row + i));
    for (; i < first + width; ++i) out[i] += static_cast<A>(row[i]);
  }
}

template <typename T>
struct RowPass {
  using A = typename Arithmetic<T>::type;
  Rows<T> logits;
  Settings settings;
  const A* bias;
  const A* scale;      // upstream gradient of each row's loss, or null: no gradient is made
  int64_t scale_step;  // 0 where one value serves all rows
  const A* lse_scale;  // upstream gradient of each row's log-sum-exp, or null
  A* lse;
  A* loss;  // null: lse is known and the loss is not wanted
  const A* square_scale = nullptr;  // upstream gradient of the square of each row's log-sum-exp, or null
  int64_t square_step = 0;
  ClassWeight<A> class_weight = {nullptr, 0};
  int64_t* predicted = nullptr;  // the first class with the largest logit, with `loss`

  void run(int64_t r, int64_t target, A* buffer) const {
    const int64_t n = logits.columns, at = target - settings.first_column;
    const bool counted = target != settings.ignore_index, here = counted && at >= 0 && at < n;
    const A g = scale && counted ? scale[r * scale_step] : A(0);
    A u = lse_scale ? lse_scale[r] : A(0);
    if (!loss && g == 0 && u == 0) return std::fill(logits.row(r), logits.row(r) + n, T(0));
    A* z = buffer;
    if constexpr (std::is_same_v<T, A>) z = logits.row(r);
    if (!std::is_same_v<T, A> || bias || settings.softcap)
      read_logits(logits.row(r), bias, A(settings.softcap), n, z);
    const A* weight = class_weight.each ? class_weight.each + settings.first_column : nullptr;
    const A smoothing = A(settings.label_smoothing), of_each = smoothing / A(settings.vocabulary);
    const A of_target = (1 - smoothing) * (weight && counted ? class_weight.each[target] : A(1));
    const A of_all = weight ? of_target + of_each * class_weight.total : A(1);
    const auto softmax = loss ? Softmax<A>::of(z, n) : Softmax<A>{lse[r], 1};
    if (loss) {
      const A origin = softmax.origin, rest = std::log(softmax.sum);
      lse[r] = origin + rest;
      loss[r] = counted ? of_all * rest + of_target * (origin - z[at]) : A(0);
      if (counted && smoothing)
        loss[r] += of_each * (weight ? weighted_gaps(z, weight, origin, n)
                                     : sum_of(z, n, origin, [&](auto v) { return origin - v; }));
      if (predicted) predicted[r] = first_of(z, origin, n);
    }
    if (!scale) return;
    if (square_scale && counted) u += 2 * square_scale[r * square_step] * lse[r];
    if (g == 0 && u == 0) return std::fill(logits.row(r), logits.row(r) + n, T(0));
    const A inverse = settings.softcap ? 1 / A(settings.softcap) : A(0), z_target = here ? z[at] : A(0);
    const Gradient<A> of{g * of_all + u, g * of_each, inverse, A(settings.gradient_filter), weight};
    if (weight || of.filter)
      write_gradient<false>(z, softmax, of, n, logits.row(r));
    else
      write_gradient<true>(z, softmax, of, n, logits.row(r));
    if (here) {
      A gradient = of.total / softmax.sum * exp_scalar(z_target - softmax.origin) -
                   of.smooth * (weight ? weight[at] : A(1)) - g * of_target;
      if (inverse) gradient *= 1 - (z_target * inverse) * (z_target * inverse);  // without, z may be −∞
      logits.row(r)[at] = static_cast<T>(gradient);
    }
  }
};

template <typename A>
A* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<A*>(t->data_ptr()) : nullptr;
}

int64_t target_of(const Tensor& target, int64_t row) {
  const int64_t i = (row % target.size(0)) * target.stride(0);
  return target.scalar_type() == ScalarType::Long ? static_cast<const int64_t*>(target.data_ptr())[i]
                                                  : static_cast<const int32_t*>(target.data_ptr())[i];
}

// All rows, and the bias gradient from them.
template <typename T, typename A>
void run_rows(const RowPass<T>& pass, const Tensor& target, int64_t first_row, A* grad_bias, bool accumulate_bias) {
  const Rows<T>& rows = pass.logits;
  torch::stable::parallel_for(0, rows.rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> buffer(std::is_same_v<T, A> ? 0 : rows.columns);
    for (int64_t r = begin; r < end; ++r) pass.run(r, target_of(target, first_row + r), buffer.data());
  });
  if (!grad_bias) return;
  constexpr int64_t kColumns = 1024;  // 4 KB of sums stay in L1 while the rows pass by
  torch::stable::parallel_for(0, (rows.columns + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      add_columns(rows, b * kColumns, std::min(kColumns, rows.columns - b * kColumns), accumulate_bias, grad_bias);
  });
}

// See the schema in registration.cpp. `scale` and `square_scale` may be expanded scalars; everything else is contiguous,
// the logits along their rows.
void linear_cross_entropy_rows(Tensor logits, Tensor lse, const std::optional<Tensor>& loss,
                               const std::optional<Tensor>& grad_bias, const std::optional<Tensor>& predicted,
                               const Tensor& target, const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& scale, const std::optional<Tensor>& lse_scale,
                               const std::optional<Tensor>& square_scale, const std::optional<Tensor>& class_weight,
                               const std::optional<Tensor>& class_total, int64_t vocabulary, int64_t first_row,
                               int64_t first_column, int64_t ignore_index, double label_smoothing, double softcap,
                               double gradient_filter, bool accumulate_bias) {
  dispatch_floating(logits.scalar_type(), "linear_cross_entropy_rows", [&](auto t) {
    using T = decltype(t);
    using A = typename Arithmetic<T>::type;
    const RowPass<T> pass{Rows<T>(logits),
                          {vocabulary, first_column, ignore_index, label_smoothing, softcap, gradient_filter},
                          data_or_null<A>(bias),
                          data_or_null<A>(scale),
                          scale ? scale->stride(0) : 0,
                          data_or_null<A>(lse_scale),
                          static_cast<A*>(lse.data_ptr()),
                          data_or_null<A>(loss),
                          data_or_null<A>(square_scale),
                          square_scale ? square_scale->stride(0) : 0,
                          {data_or_null<A>(class_weight), class_total ? *data_or_null<A>(class_total) : A(0)},
                          data_or_null<int64_t>(predicted)};
    run_rows(pass, target, first_row, data_or_null<A>(grad_bias), accumulate_bias);
  });
}

// How many targets count, or -1 - i where target i is neither in the vocabulary nor ignored.
int64_t linear_cross_entropy_count(const Tensor& target, int64_t vocabulary, int64_t ignore_index) {
  int64_t counted = 0;
  for (int64_t i = 0; i < target.size(0); ++i) {
    const int64_t value = target_of(target, i);
    if (value == ignore_index) continue;
    if (value < 0 || value >= vocabulary) return -1 - i;
    ++counted;
  }
  return counted;
}

// (K,): share * sum of each head's losses, added up in double.
template <typename A>
Tensor total(const Tensor& losses, int64_t heads, A share) {
  const Tensor result = torch::stable::new_empty(losses, {heads});
  const A* values = static_cast<const A*>(losses.data_ptr());
  const int64_t rows = losses.size(0) / heads;
  for (int64_t k = 0; k < heads; ++k, values += rows) {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += values[i];
    static_cast<A*>(result.data_ptr())[k] = static_cast<A>(sum * share);
  }
  return result;
}

Tensor linear_cross_entropy_total(const Tensor& losses, int64_t heads, const Tensor& share) {
  if (losses.scalar_type() == ScalarType::Double)
    return total(losses, heads, *static_cast<const double*>(share.data_ptr()));
  return total(losses, heads, *static_cast<const float*>(share.data_ptr()));
}

// A whole problem in one call: where it is small, calls cost more than products. Operands are fp32 or double and can be
// read where they lie. Gradients are those of Σ loss, empty where they are not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_small(
    const Tensor& hidden_states, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
    int64_t heads, int64_t ignore_index, double label_smoothing, double softcap, bool mean, bool needs_hidden_states,
    bool needs_weight, bool needs_bias) {
  const int64_t n = hidden_states.size(0), d = hidden_states.size(1), vocabulary = weight.size(0);
  const int64_t counted = linear_cross_entropy_count(target, vocabulary, ignore_index);
  STD_TORCH_CHECK(counted >= 0, "target: outside the vocabulary");
  const Tensor logits = torch::stable::new_empty(hidden_states, {n, vocabulary});
  const Tensor lse = torch::stable::new_empty(hidden_states, {n}), losses = torch::stable::new_empty(hidden_states, {n});
  const auto gradient = [&](bool needed, int64_t rows) {
    return needed ? torch::stable::new_empty(hidden_states, {rows, d}) : torch::stable::new_empty(hidden_states, {0});
  };
  const Tensor grad_hidden = gradient(needs_hidden_states, n), grad_weight = gradient(needs_weight, vocabulary);
  const Tensor grad_bias = torch::stable::new_empty(hidden_states, {needs_bias ? vocabulary : 0});
  vendor_multiply(logits, hidden_states, transposed(weight), false);
  Tensor loss;
  dispatch_floating(logits.scalar_type(), "linear_cross_entropy_small", [&](auto t) {
    using A = typename Arithmetic<decltype(t)>::type;
    if constexpr (std::is_same_v<A, decltype(t)>) {
      const A share = mean ? A(1) / static_cast<A>(std::max<int64_t>(counted, 1)) : A(1);
      const bool backward = needs_hidden_states || needs_weight || needs_bias;
      const RowPass<A> pass{Rows<A>(logits),
                            {vocabulary, 0, ignore_index, label_smoothing, softcap, 0},
                            data_or_null<A>(bias),
                            backward ? &share : nullptr,
                            0,
                            nullptr,
                            static_cast<A*>(lse.data_ptr()),
                            static_cast<A*>(losses.data_ptr())};
      run_rows(pass, target, 0, needs_bias ? static_cast<A*>(grad_bias.data_ptr()) : nullptr, false);
      loss = total(losses, heads, share);
    }
  });
  if (needs_hidden_states) vendor_multiply(grad_hidden, logits, weight, false);
  if (needs_weight) vendor_multiply(grad_weight, transposed(logits), hidden_states, false);
  return {loss, lse, grad_hidden, grad_weight, grad_bias};
}

// total += product, a 16-bit GEMM's result into the wide sum it belongs to. Bandwidth: product once, total twice
// (PyTorch's add converts the product to a wide copy first).
void linear_cross_entropy_add(Tensor total, const Tensor& product) { add(total, product); }

void linear_cross_entropy_advise(Tensor fresh) { advise_huge_pages(fresh); }

void linear_cross_entropy_multiply(Tensor out, const Tensor& a, const Tensor& b, bool accumulate) {
  multiply(out, a, b, accumulate);
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("linear_cross_entropy_rows", TORCH_BOX(&repdeg_fast::linear_cross_entropy_rows));
  m.impl("linear_cross_entropy_count", TORCH_BOX(&repdeg_fast::linear_cross_entropy_count));
  m.impl("linear_cross_entropy_total", TORCH_BOX(&repdeg_fast::linear_cross_entropy_total));
  m.impl("linear_cross_entropy_small", TORCH_BOX(&repdeg_fast::linear_cross_entropy_small));
  m.impl("linear_cross_entropy_advise", TORCH_BOX(&repdeg_fast::linear_cross_entropy_advise));
  m.impl("linear_cross_entropy_multiply", TORCH_BOX(&repdeg_fast::linear_cross_entropy_multiply));
  m.impl("linear_cross_entropy_add", TORCH_BOX(&repdeg_fast::linear_cross_entropy_add));
}
