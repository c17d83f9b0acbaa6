// Gumbel sampling and its straight-through gradient on the CPU. Mathematics: repdeg_fast/reference/gumbel_mix.py.
//
// Forward is one GEMM, a chunk of the vocabulary at a time, and one pass over its output in L2: bias, noise made from
// a counter, running maximum with its token, running sum of exponentials.
//
// Backward makes the same logits again, a second GEMM. It then needs E[v] and F[v] only where y_v counts: at τ = 0.3 the
// noise alone leaves 7 % of 30,522 tokens above 2⁻²⁴/V, and all others together weigh less than the rounding of Σ y = 1.
// So instead of two more GEMMs (F[v]·r and dz·E) the tokens that count are collected and worked on four at a time, out
// of a slab of E and F that stays in L2 for all rows. dz needs δ, which is known only at the end of the row, but
// dh̄ = (Σ y F·r E − δ Σ y E)/τ is linear in it: both sums are kept and nothing is swept twice. The price is paid where
// every token counts (τ of 1 and more): three products a token instead of a GEMM's two.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "gemm.h"
#include "noise.h"

namespace repdeg_fast {
namespace {

constexpr int64_t kBufferBytes = 32 << 20;  // logits, and converted operands, of one chunk of the vocabulary
constexpr int64_t kAlign = 16;  // columns; rows of logits that start on a cache line also make MKL's h Eᵀ faster
constexpr int64_t kSlab = 128;  // rows of E and F that stay in L2 while all rows of hidden states pass: 768 KB at d = 768
constexpr int64_t kGroup = 4;   // tokens that share one pass over a row's sums

int64_t aligned(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

// How the vocabulary is cut: chunks of about equal size whose buffers take kBufferBytes.
int64_t chunk_columns(int64_t vocabulary, int64_t values_per_column, int64_t value_bytes) {
  const int64_t most = std::max<int64_t>(kSlab, kBufferBytes / value_bytes / std::max<int64_t>(values_per_column, 1));
  const int64_t chunks = (vocabulary + most - 1) / most;
  return aligned((vocabulary + chunks - 1) / chunks);
}

// z of a chunk of the vocabulary for all rows, padded with −∞ to whole vectors.
template <typename A>
struct Chunk {
  A* data;
  int64_t stride, first, columns;  // `first` is a multiple of four: it starts a Philox call
  const A* bias;                   // padded likewise; null: none

  A* row(int64_t i) const { return data + i * stride; }

  // z + g of a row in place; returns the largest (NaN apart).
  A perturb(int64_t i, uint64_t seed) const {
    constexpr int64_t L = Vector<A>::lanes, kBlock = 1024;
    alignas(64) uint32_t words[kBlock];
    A* z = row(i);
    for (int64_t c = columns; c < aligned(columns); ++c) z[c] = -INFINITY;
    auto most = broadcast(A(-INFINITY));
    for (int64_t block = 0; block < columns; block += kBlock) {
      const int64_t n = std::min(kBlock, aligned(columns) - block);
      fill_words(words, seed, uint32_t(i), kGumbelStream, uint32_t((first + block) / 4), n);
      for (int64_t c = 0; c < n; c += L) {
        auto s = load(z + block + c);
        if (bias) s += load(bias + first + block + c);
        s += gumbel_noise<A>(words + c);
        store(z + block + c, s);
        most = s > most ? s : most;
      }
    }
    A result = most[0];
    for (int64_t k = 1; k < L; ++k) result = std::max(result, A(most[k]));
    return result;
  }
};

// The bias, long enough to be read in whole vectors; empty where there is none.
template <typename A>
std::vector<A> padded(const std::optional<Tensor>& bias) {
  if (!bias) return {};
  const A* given = static_cast<const A*>(bias->data_ptr());
  std::vector<A> values(given, given + bias->numel());
  values.resize(aligned(bias->numel()) + kAlign);
  return values;
}

// Operands of one call, the same in both directions.
template <typename A>
struct Vocabulary {
  static constexpr ScalarType wide = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor& weight;
  const std::optional<Tensor> embedding;  // null: not needed
  ScalarType narrow;                       // what the products with the weight are taken of
  Tensor hidden, logits;
  const std::vector<A> bias;
  int64_t size, columns;

  Vocabulary(const Tensor& mixed, const Tensor& weight, const std::optional<Tensor>& bias_tensor,
             const std::optional<Tensor>& embedding)
      : weight(weight),
        embedding(embedding),
        narrow(mixed.scalar_type()),
        hidden(operand(mixed, narrow, wide)),
        logits(mixed),
        bias(padded<A>(bias_tensor)),
        size(weight.size(0)) {
    int64_t values = mixed.size(0);
    if (!is_operand(weight, wide) || narrow != wide) values += weight.size(1);
    if (embedding && !is_operand(*embedding, wide)) values += embedding->size(1);
    columns = chunk_columns(size, values, sizeof(A));
    logits = torch::stable::new_empty(mixed, {mixed.size(0), columns}, wide);
  }

  Tensor columns_of_logits(int64_t n) { return torch::stable::narrow(logits, 1, 0, n); }

  // f(chunk of logits, its rows of E, its rows of F) for each chunk in turn.
  template <typename F>
  void each_chunk(F&& f) {
    for (int64_t first = 0; first < size; first += columns) {
      const int64_t n = std::min(columns, size - first);
      const Tensor e = operand(rows_of(weight, first, n), narrow, wide);
      multiply(columns_of_logits(n), hidden, transposed(e));
      f(Chunk<A>{static_cast<A*>(logits.data_ptr()), columns, first, n, bias.empty() ? nullptr : bias.data()}, e,
        embedding ? operand(rows_of(*embedding, first, n), embedding->scalar_type(), wide) : e);
    }
  }
};

// What is known of a row after some of the vocabulary: the largest z + g, Σ exp((z + g − largest)/τ).
template <typename A>
struct RowState {
  A most = -INFINITY, sum = 0;

  A origin() const { return most == -INFINITY ? A(0) : most; }  // −∞ − −∞ would be NaN

  // Take in n values, of which `most_here` is the largest.
  void take(const A* s, int64_t n, A most_here, A inverse_temperature, int64_t first, int64_t* token) {
    constexpr int64_t L = Vector<A>::lanes;
    const A before = most;
    if (most_here > most) {
      most = most_here;
      *token = first + (std::find(s, s + n, most_here) - s);
    }
    const A zero = origin();
    typename Vector<A>::type total[2] = {};
    for (int64_t c = 0; c < aligned(n); c += L)
      total[c / L % 2] += exp((load(s + c) - zero) * inverse_temperature);
    sum *= std::exp((before - zero) * inverse_temperature);
    for (int64_t k = 0; k < L; ++k) sum += total[0][k] + total[1][k];
  }

  A peak() const { return 1 / sum; }  // y of the token; not finite where some z is NaN or +∞, or all are −∞
};

template <typename A>
void sample(const Tensor& token_ids, const Tensor& peak, const Tensor& mixed, const Tensor& weight,
            const std::optional<Tensor>& bias, uint64_t seed, A inverse_temperature) {
  const int64_t m = mixed.size(0);
  Vocabulary<A> vocabulary(mixed, weight, bias, std::nullopt);
  std::vector<RowState<A>> state(m);
  int64_t* tokens = static_cast<int64_t*>(token_ids.data_ptr());
  std::fill(tokens, tokens + m, int64_t(0));
  vocabulary.each_chunk([&](const Chunk<A>& z, const Tensor&, const Tensor&) {
    torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A most = z.perturb(i, seed);
        state[i].take(z.row(i), z.columns, most, inverse_temperature, z.first, tokens + i);
      }
    });
  });
  A* out = static_cast<A*>(peak.data_ptr());
  for (int64_t i = 0; i < m; ++i) out[i] = state[i].peak();
}

// The same from the logits of K heads. Bandwidth: they are read once; their mixture, one row of the vocabulary, stays in
// L2 while noise is added and it is looked at.
template <typename T, typename A>
void sample_logits(const Tensor& token_ids, const Tensor& peak, const Tensor& logits, const Tensor& alpha,
                   const std::optional<Tensor>& bias_tensor, uint64_t seed, A inverse_temperature, int64_t first_row) {
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t heads = logits.size(0), m = logits.size(1), size = logits.size(2);
  const T* z = static_cast<const T*>(logits.data_ptr());
  const Rows<A> weights(alpha);
  const std::vector<A> bias = padded<A>(bias_tensor);
  int64_t* tokens = static_cast<int64_t*>(token_ids.data_ptr());
  A* out = static_cast<A*>(peak.data_ptr());
  torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> mixed(aligned(size));
    const Chunk<A> row{mixed.data(), 0, 0, size, bias.empty() ? nullptr : bias.data()};
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = 0; k < heads; ++k) {
        const T* from = z + k * logits.stride(0) + i * logits.stride(1);
        const A weight = *(weights.row(i) + k);
        int64_t c = 0;
        for (; c + L <= size; c += L) {
          const auto added = weight * load_values(from + c);
          store(mixed.data() + c, k ? load(mixed.data() + c) + added : added);
        }
        for (; c < size; ++c) mixed[c] = weight * static_cast<A>(from[c]) + (k ? mixed[c] : A(0));
      }
      tokens[i] = 0;
      RowState<A> state;
      state.take(mixed.data(), size, row.perturb(first_row + i, seed), inverse_temperature, 0, tokens + i);
      out[i] = state.peak();
    }
  });
}

// A row of a matrix, as `operand` has it, times contiguous values.
template <typename A>
A row_product(const Tensor& matrix, int64_t row, ScalarType narrow, const A* values) {
  const Tensor one = operand(rows_of(matrix, row, 1), narrow, Vocabulary<A>::wide);
  return dot(values, static_cast<const A*>(one.data_ptr()), one.size(1));
}

// The sample, as the sweeps over its y take it: y = peak · exp((z + g − origin)/τ), where origin is z + g of the drawn
// token and peak its y, the largest. Another sweep may round z otherwise and see a token above the drawn one, which at a
// small τ would be far above: it counts as equal.
template <typename A>
struct Drawn {
  const int64_t* token;
  const A* peak;
  std::vector<A> origin;
  uint64_t seed;
  A inverse_temperature;

  Drawn(const Vocabulary<A>& vocabulary, const Tensor& token_ids, const Tensor& peaks, uint64_t seed,
        A inverse_temperature)
      : token(static_cast<const int64_t*>(token_ids.data_ptr())),
        peak(static_cast<const A*>(peaks.data_ptr())),
        origin(token_ids.size(0)),
        seed(seed),
        inverse_temperature(inverse_temperature) {
    const Rows<A> hidden(vocabulary.hidden);
    for (int64_t i = 0; i < int64_t(origin.size()); ++i) {
      const int64_t t = token[i];
      uint32_t words[Vector<A>::lanes];
      std::fill(words, words + Vector<A>::lanes, philox(seed, uint32_t(t / 4), uint32_t(i), kGumbelStream).lane[t % 4]);
      origin[i] = row_product(vocabulary.weight, t, vocabulary.narrow, hidden.row(i)) + gumbel_noise<A>(words)[0];
      if (!vocabulary.bias.empty()) origin[i] += vocabulary.bias[t];
    }
  }

  // z + g of a row of a chunk, with the drawn token's as the origin has it.
  void perturb(const Chunk<A>& z, int64_t i) const {
    z.perturb(i, seed);
    const int64_t at = token[i] - z.first;
    if (0 <= at && at < z.columns) z.row(i)[at] = origin[i];
  }

  // log(y / peak) of some z + g of a row; NaN stays NaN.
  typename Vector<A>::type exponent(typename Vector<A>::type s, int64_t i) const {
    const auto x = (s - origin[i]) * inverse_temperature;
    return x > A(0) ? broadcast(A(0)) : x;
  }

  // y of a row of a chunk in place of its z + g; returns their sum.
  A write_weights(const Chunk<A>& z, int64_t i) const {
    constexpr int64_t L = Vector<A>::lanes;
    typename Vector<A>::type sum = {};
    for (A* s = z.row(i); s < z.row(i) + z.columns; s += L) {
      const auto y = exp(exponent(load(s), i)) * peak[i];
      store(s, y);
      sum += y;
    }
    A total = 0;
    for (int64_t k = 0; k < L; ++k) total += sum[k];
    return total;
  }
};

// Σ y F, divided by what y adds up to: 1, but for tokens that count as equal to the drawn one.
template <typename A>
void soft_value(const Tensor& value, const Tensor& mixed, const Tensor& weight, const std::optional<Tensor>& bias,
                const Tensor& embedding, const Tensor& token_ids, const Tensor& peak, uint64_t seed,
                A inverse_temperature) {
  const int64_t m = mixed.size(0);
  Vocabulary<A> vocabulary(mixed, weight, bias, embedding);
  const Drawn<A> drawn(vocabulary, token_ids, peak, seed, inverse_temperature);
  std::vector<A> total(m);
  vocabulary.each_chunk([&](const Chunk<A>& z, const Tensor&, const Tensor& f) {
    torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) drawn.perturb(z, i);
      for (int64_t i = begin; i < end; ++i) total[i] += drawn.write_weights(z, i);
    });
    multiply(value, vocabulary.columns_of_logits(z.columns), f, z.first > 0);
  });
  const Rows<A> out(value);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < out.columns; ++j) out.row(i)[j] /= total[i];
}

// Tokens of one slab that count for one row: which, and their y.
template <typename A>
struct Tokens {
  int64_t count = 0;
  int32_t index[kSlab + kGroup];
  A y[kSlab + kAlign];

  // Those of n ≤ kSlab values s of row i whose exponent is at least `smallest`.
  void collect(const A* s, int64_t n, const Drawn<A>& drawn, int64_t i, A smallest) {
    constexpr int64_t L = Vector<A>::lanes;
    count = 0;
    for (int64_t c = 0; c < n; c += L) {
      const auto exponent = drawn.exponent(load(s + c), i);
      const auto counts = exponent >= smallest;
      for (int64_t k = 0; k < L; ++k) {  // no branch: one in ten counts, in no order
        index[count] = int32_t(c + k);
        y[count] = exponent[k];
        count -= counts[k];
      }
    }
    for (int64_t c = 0; c < count; c += L) store(y + c, exp(load(y + c)) * drawn.peak[i]);
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

template <typename A>
void backward(const std::optional<Tensor>& grad_mixed, const std::optional<Tensor>& grad_embedding, const Tensor& grad,
              const Tensor& mixed, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& embedding,
              const Tensor& token_ids, const Tensor& peak, uint64_t seed, A inverse_temperature) {
  const int64_t m = mixed.size(0), d = mixed.size(1);
  Vocabulary<A> vocabulary(mixed, weight, bias, grad_mixed ? std::optional<Tensor>(embedding) : std::nullopt);
  const Drawn<A> drawn(vocabulary, token_ids, peak, seed, inverse_temperature);
  const Tensor upstream = operand(grad, grad.scalar_type(), Vocabulary<A>::wide);
  const Rows<A> r(upstream);
  const A negligible = std::numeric_limits<A>::epsilon() / 2 / A(weight.size(0));
  const Tensor plain_tensor = torch::stable::new_zeros(peak, {grad_mixed ? m : 0, d});
  A* plain = static_cast<A*>(plain_tensor.data_ptr());
  A* weighted = grad_mixed ? static_cast<A*>(grad_mixed->data_ptr()) : nullptr;
  if (grad_mixed) std::fill(weighted, weighted + m * d, A(0));
  std::vector<A> smallest(m), origin(m);
  for (int64_t i = 0; grad_mixed && i < m; ++i) {
    smallest[i] = std::log(negligible / drawn.peak[i]);
    origin[i] = row_product(embedding, drawn.token[i], embedding.scalar_type(), r.row(i));
  }
  std::vector<double> delta(m), total(m);
  const auto sums = [&](int64_t i) { return RowSums<A>{weighted + i * d, plain + i * d, &delta[i], &total[i]}; };

  vocabulary.each_chunk([&](const Chunk<A>& z, const Tensor& e_tensor, const Tensor& f_tensor) {
    torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) drawn.perturb(z, i);
      if (!grad_mixed) return;
      const Rows<A> e(e_tensor), f(f_tensor);
      Tokens<A> tokens;
      Buffer<A> scratch(2 * d);
      for (int64_t slab = 0; slab < z.columns; slab += kSlab) {
        const int64_t n = std::min(kSlab, z.columns - slab);
        const Rows<A> e_slab = e.from(slab), f_slab = f.from(slab);
        for (int64_t i = begin; i < end; ++i) {
          tokens.collect(z.row(i) + slab, n, drawn, i, smallest[i]);
          sums(i).take(tokens, e_slab, f_slab, r.row(i), origin[i], drawn.token[i] - z.first - slab,
                       scratch.data());
        }
      }
    });
    if (!grad_embedding) return;
    torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) drawn.write_weights(z, i);
    });
    const Tensor y = vocabulary.columns_of_logits(z.columns);
    const Tensor out = rows_of(*grad_embedding, z.first, z.columns);
    if (out.scalar_type() == Vocabulary<A>::wide) return multiply(out, transposed(y), upstream);
    Tensor rounded = out;
    torch::stable::copy_(rounded, torch::stable::matmul(transposed(y), upstream));
  });
  for (int64_t i = 0; grad_mixed && i < m; ++i) {
    if (!std::isfinite(drawn.peak[i])) delta[i] = NAN;  // no token counts where the logits are NaN
    sums(i).finish(drawn.inverse_temperature, d);
  }
}

uint64_t key_of(const Tensor& seed) { return uint64_t(*static_cast<const int64_t*>(seed.data_ptr())); }

template <typename A>
A inverse(double temperature) {
  return A(std::min(1 / temperature, double(std::numeric_limits<A>::max())));  // ∞ · 0 would be NaN
}

// Call f with a value of the type of arithmetic.
template <typename F>
void dispatch_wide(const Tensor& values, F&& f) {
  values.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

void gumbel_mix_sample(Tensor token_ids, Tensor peak, const Tensor& mixed, const Tensor& weight,
                       const std::optional<Tensor>& bias, const Tensor& seed, double temperature) {
  dispatch_wide(peak, [&](auto a) {
    using A = decltype(a);
    sample<A>(token_ids, peak, mixed, weight, bias, key_of(seed), inverse<A>(temperature));
  });
}

void gumbel_mix_sample_logits(Tensor token_ids, Tensor peak, const Tensor& logits, const Tensor& alpha,
                              const std::optional<Tensor>& bias, const Tensor& seed, double temperature,
                              int64_t first_row) {
  dispatch_floating(logits.scalar_type(), "gumbel_mix_sample_logits", [&](auto t) {
    using T = decltype(t);
    using A = typename Arithmetic<T>::type;
    sample_logits<T, A>(token_ids, peak, logits, alpha, bias, key_of(seed), inverse<A>(temperature), first_row);
  });
}

void gumbel_mix_soft_value(Tensor value, const Tensor& mixed, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Tensor& embedding, const Tensor& token_ids, const Tensor& peak, const Tensor& seed,
                           double temperature) {
  dispatch_wide(peak, [&](auto a) {
    using A = decltype(a);
    soft_value<A>(value, mixed, weight, bias, embedding, token_ids, peak, key_of(seed), inverse<A>(temperature));
  });
}

void gumbel_mix_backward(const std::optional<Tensor>& grad_mixed, const std::optional<Tensor>& grad_embedding,
                         const Tensor& grad_embeddings, const Tensor& mixed, const Tensor& weight,
                         const std::optional<Tensor>& bias, const Tensor& embedding, const Tensor& token_ids,
                         const Tensor& peak, const Tensor& seed, double temperature) {
  dispatch_wide(peak, [&](auto a) {
    using A = decltype(a);
    backward<A>(grad_mixed, grad_embedding, grad_embeddings, mixed, weight, bias, embedding, token_ids, peak,
                key_of(seed), inverse<A>(temperature));
  });
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("gumbel_mix_sample", TORCH_BOX(&repdeg_fast::gumbel_mix_sample));
  m.impl("gumbel_mix_sample_logits", TORCH_BOX(&repdeg_fast::gumbel_mix_sample_logits));
  m.impl("gumbel_mix_soft_value", TORCH_BOX(&repdeg_fast::gumbel_mix_soft_value));
  m.impl("gumbel_mix_backward", TORCH_BOX(&repdeg_fast::gumbel_mix_backward));
}
