// The straight-through gradient of a sample.
//
// The logits are made again, and E[v] and F[v] are needed only where y_v counts: at τ = 0.3 the noise alone leaves 7 % of
// 30,522 tokens above 2⁻²⁴/V, and all others together weigh less than the rounding of Σ y = 1. So instead of two more
// GEMMs (F[v]·r and dz·E) the tokens that count are collected and worked on four at a time, out of a slab of E and F that
// stays in L2 for all rows. dz needs δ, which is known only at the end of the row, but dh̄ = (Σ y F·r E − δ Σ y E)/τ is
// linear in it: both sums are kept and nothing is swept twice. The price is paid where every token counts (τ of 1 and
// more): three products a token instead of a GEMM's two.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gumbel_mix.h"
#include "gumbel_mix_heads.h"

namespace repdeg_fast::gumbel_mix {
namespace {

// Tokens of one slab that count for one row: which, and their y.
template <typename A>
struct Tokens {
  int64_t count = 0;
  int32_t index[kSlab + kGroup];
  A y[kSlab + kAlign];

  // Those of n ≤ kSlab values s of row i whose exponent is at least `smallest`.
  void collect(const A* s, int64_t n, const Sample<A>& sample, int64_t i, A smallest) {
    constexpr int64_t L = Vector<A>::lanes;
    count = 0;
    for (int64_t c = 0; c < n; c += L) {
      const auto exponent = sample.exponent(load(s + c), i);
      const auto counts = exponent >= smallest;
      for (int64_t k = 0; k < L; ++k) {  // no branch: one in ten counts, in no order
        index[count] = int32_t(c + k);
        y[count] = exponent[k];
        count -= counts[k];
      }
    }
    for (int64_t c = 0; c < count; c += L) store(y + c, exp(load(y + c)) * sample.peak[i]);
    for (int64_t k = count; k < count + kGroup; ++k) {  // whole groups: a token that is there, with weight 0
      index[k] = count ? index[count - 1] : 0;
      y[k] = 0;
    }
  }
};

// Four rows that are read together. Pointers and factors are copied into locals: the compiler must see that no store
// to the sums changes them, or it loads them again each time.
template <typename A>
struct Group {
  const A* row[kGroup];

  Group(const Rows<A>& rows, const int32_t* index) {
    for (int64_t k = 0; k < kGroup; ++k) row[k] = rows.row(index[k]);
  }

  // row[k]·r
  void products(const A* r, int64_t d, A* out) const {
    constexpr int64_t L = Vector<A>::lanes;
    const A *x0 = row[0], *x1 = row[1], *x2 = row[2], *x3 = row[3];
    typename Vector<A>::type s0 = {}, s1 = {}, s2 = {}, s3 = {};
    int64_t i = 0;
    for (; i + L <= d; i += L) {
      const auto v = load(r + i);
      s0 += load(x0 + i) * v;
      s1 += load(x1 + i) * v;
      s2 += load(x2 + i) * v;
      s3 += load(x3 + i) * v;
    }
    A sum[kGroup] = {};
    for (; i < d; ++i)
      for (int64_t k = 0; k < kGroup; ++k) sum[k] += row[k][i] * r[i];
    for (int64_t l = 0; l < L; ++l) {
      sum[0] += s0[l];
      sum[1] += s1[l];
      sum[2] += s2[l];
      sum[3] += s3[l];
    }
    std::copy(sum, sum + kGroup, out);
  }

  // a += Σ p[k] row[k] and b += Σ q[k] row[k]
  void add_to(A* a, const A* p, A* b, const A* q, int64_t d) const {
    constexpr int64_t L = Vector<A>::lanes;
    const A *x0 = row[0], *x1 = row[1], *x2 = row[2], *x3 = row[3];
    const A p0 = p[0], p1 = p[1], p2 = p[2], p3 = p[3], q0 = q[0], q1 = q[1], q2 = q[2], q3 = q[3];
    int64_t i = 0;
    for (; i + L <= d; i += L) {
      const auto v0 = load(x0 + i), v1 = load(x1 + i), v2 = load(x2 + i), v3 = load(x3 + i);
      store(a + i, load(a + i) + (p0 * v0 + p1 * v1 + p2 * v2 + p3 * v3));
      store(b + i, load(b + i) + (q0 * v0 + q1 * v1 + q2 * v2 + q3 * v3));
    }
    for (; i < d; ++i)
      for (int64_t k = 0; k < kGroup; ++k) {
        a[i] += p[k] * row[k][i];
        b[i] += q[k] * row[k][i];
      }
  }
};

// The sums of a row that dh̄ is made of.
template <typename A>
struct RowSums {
  A* weighted;    // Σ y (F·r − origin) E
  A* plain;       // Σ y E
  double* delta;  // Σ y (F·r − origin)
  double* total;  // Σ y, near 1

  // `drawn`, where it is among the tokens: its F·r is the origin. Where most of a slab counts, its sums are made in
  // `scratch` (2d values): small numbers added to a large one, four at a time, would all be rounded at its size.
  void take(const Tokens<A>& tokens, const Rows<A>& e, const Rows<A>& f, const A* r, A origin, int64_t drawn,
            A* scratch) {
    const int64_t d = e.columns;
    const bool many = tokens.count > kSlab / 2;
    A *a = many ? scratch : weighted, *b = many ? scratch + d : plain;
    if (many) std::fill(scratch, scratch + 2 * d, A(0));
    for (int64_t t = 0; t < tokens.count; t += kGroup) {
      A product[kGroup];
      Group<A>(f, tokens.index + t).products(r, f.columns, product);
      for (int64_t k = 0; k < kGroup; ++k) {
        product[k] = tokens.index[t + k] == drawn ? A(0) : (product[k] - origin) * tokens.y[t + k];
        *delta += product[k];
        *total += tokens.y[t + k];
      }
      Group<A>(e, tokens.index + t).add_to(a, product, b, tokens.y + t, d);
    }
    if (!many) return;
    for (int64_t j = 0; j < d; ++j) {
      weighted[j] += a[j];
      plain[j] += b[j];
    }
  }

  void finish(A inverse_temperature, int64_t d) {
    const A mean = A(*delta / *total), factor = A(inverse_temperature / *total);
    for (int64_t j = 0; j < d; ++j) weighted[j] = (weighted[j] - mean * plain[j]) * factor;
  }
};

// dh̄ and, of soft values, dF, each where it is given.
template <typename A>
void sweep(const std::optional<Tensor>& grad_mixed, const std::optional<Tensor>& grad_embedding, const Tensor& grad,
           const Tensor& mixed, ScalarType narrow, const Projection& projection, const Tensor& embedding,
           const Drawn& drawn, const Noise& noise) {
  const int64_t m = mixed.size(0), d = mixed.size(1);
  Vocabulary<A> vocabulary(mixed, narrow, projection, grad_mixed ? std::optional<Tensor>(embedding) : std::nullopt);
  const Sample<A> sample(vocabulary, drawn, noise);
  const Tensor upstream = operand(grad, grad.scalar_type(), Vocabulary<A>::wide);
  const Rows<A> r(upstream);
  const A negligible = std::numeric_limits<A>::epsilon() / 2 / A(vocabulary.size);
  const Tensor plain_tensor = torch::stable::new_zeros(mixed, {grad_mixed ? m : 0, d});
  A* plain = static_cast<A*>(plain_tensor.data_ptr());
  A* weighted = grad_mixed ? static_cast<A*>(grad_mixed->data_ptr()) : nullptr;
  if (grad_mixed) std::fill(weighted, weighted + m * d, A(0));
  std::vector<A> smallest(m), origin(m);
  if (grad_mixed) row_products(embedding, sample.token, embedding.scalar_type(), r, origin.data());
  for (int64_t i = 0; grad_mixed && i < m; ++i) smallest[i] = std::log(negligible / sample.peak[i]);
  std::vector<double> delta(m), total(m);
  const auto sums = [&](int64_t i) { return RowSums<A>{weighted + i * d, plain + i * d, &delta[i], &total[i]}; };

  vocabulary.each_chunk([&](const Chunk<A>& z, const Tensor& e_tensor, const Tensor& f_tensor) {
    torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sample.perturb(z, i);
      if (!grad_mixed) return;
      const Rows<A> e(e_tensor), f(f_tensor);
      Tokens<A> tokens;
      Buffer<A> scratch(2 * d);
      for (int64_t slab = 0; slab < z.columns; slab += kSlab) {
        const int64_t n = std::min(kSlab, z.columns - slab);
        const Rows<A> e_slab = e.from(slab), f_slab = f.from(slab);
        for (int64_t i = begin; i < end; ++i) {
          tokens.collect(z.row(i) + slab, n, sample, i, smallest[i]);
          sums(i).take(tokens, e_slab, f_slab, r.row(i), origin[i], sample.token[i] - z.first - slab,
                       scratch.data());
        }
      }
    });
    if (!grad_embedding) return;
    torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sample.write_weights(z, i);
    });
    const Tensor y = vocabulary.columns_of_logits(z.columns);
    const Tensor out = rows_of(*grad_embedding, z.first, z.columns);
    if (out.scalar_type() == Vocabulary<A>::wide) return multiply(out, transposed(y), upstream);
    Tensor rounded = out;
    torch::stable::copy_(rounded, torch::stable::matmul(transposed(y), upstream));
  });
  for (int64_t i = 0; grad_mixed && i < m; ++i) {
    if (!std::isfinite(sample.peak[i])) delta[i] = NAN;  // no token counts where the logits are NaN
    sums(i).finish(sample.inverse_temperature, d);
  }
}

// dF of hard values. A thread owns some of the vocabulary and adds up its rows in their order.
Tensor embed_backward(const Tensor& grad, const Tensor& token_ids, int64_t size) {
  const Tensor out = torch::stable::new_zeros(grad, {size, grad.size(1)});
  const int64_t* tokens = static_cast<const int64_t*>(token_ids.data_ptr());
  dispatch_floating(grad.scalar_type(), "gumbel_mix_backward", [&](auto t) {
    using T = decltype(t);
    using A = typename Arithmetic<T>::type;
    constexpr int64_t L = Vector<A>::lanes;
    const Rows<T> rows(grad), sums(out);
    torch::stable::parallel_for(0, size, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < rows.rows; ++i) {
        if (tokens[i] < begin || end <= tokens[i]) continue;
        const T* row = rows.row(i);
        T* sum = sums.row(tokens[i]);
        int64_t j = 0;
        for (; j + L <= rows.columns; j += L) store_values(sum + j, load_values(sum + j) + load_values(row + j));
        for (; j < rows.columns; ++j) sum[j] = static_cast<T>(static_cast<A>(sum[j]) + static_cast<A>(row[j]));
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_values, const Tensor& hidden_states,
                                    const std::optional<Tensor>& mixture_logits, const Tensor& weight,
                                    const std::optional<Tensor>& bias, const Tensor& embedding,
                                    const Tensor& token_ids, const Tensor& peak, const Tensor& seed,
                                    double temperature, int64_t first_row, bool hard, double gradient_scale,
                                    bool wants_mixture, bool wants_embedding) {
  const ScalarType narrow = hidden_states.scalar_type(), wide = wide_of(narrow);
  const bool soft_embedding = wants_embedding && !hard;
  wants_mixture = wants_mixture && mixture_logits;
  Tensor grad_mixture = torch::stable::new_empty(peak, {0}), grad_embedding = grad_mixture;
  if (wants_embedding && hard) grad_embedding = embed_backward(grad_values, token_ids, weight.size(0));
  if (soft_embedding) grad_embedding = torch::stable::new_empty(embedding, {embedding.size(0), embedding.size(1)});
  if (!wants_mixture && !soft_embedding) return {grad_mixture, grad_embedding};
  dispatch_wide(wide, [&](auto a) {
    using A = decltype(a);
    const Tensor mixed = mix<A>(hidden_states, mixture_logits, wide);
    std::optional<Tensor> grad_mixed, grad_soft;
    if (wants_mixture) grad_mixed = torch::stable::new_empty(mixed, {mixed.size(0), mixed.size(1)});
    if (soft_embedding) grad_soft = grad_embedding;
    sweep<A>(grad_mixed, grad_soft, grad_values, mixed, narrow, {weight, bias}, embedding, {token_ids, peak},
             {seed, temperature, first_row});
    if (wants_mixture) grad_mixture = mix_backward<A>(*grad_mixed, hidden_states, *mixture_logits, A(gradient_scale));
  });
  return {grad_mixture, grad_embedding};
}

}  // namespace
}  // namespace repdeg_fast::gumbel_mix

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("gumbel_mix_backward", TORCH_BOX(&repdeg_fast::gumbel_mix::backward));
}
