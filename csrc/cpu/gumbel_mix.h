// What the parts of Gumbel mixing share: logits of a chunk of the vocabulary with their noise, and a sample as the sweeps
// over its y take it. Mathematics: repdeg_fast/reference/gumbel_mix.py.
//
// Forward (gumbel_mix_sample.cpp) is one GEMM, a chunk of the vocabulary at a time, and one pass over its output in L2:
// bias, noise made from a counter, running maximum with its token, running sum of exponentials. Backward
// (gumbel_mix_backward.cpp) makes the same logits again.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "gemm.h"
#include "noise.h"

namespace repdeg_fast::gumbel_mix {

constexpr int64_t kBufferBytes = 32 << 20;  // logits, and converted operands, of one chunk of the vocabulary
constexpr int64_t kAlign = 16;  // columns; rows of logits that start on a cache line also make MKL's h Eᵀ faster
constexpr int64_t kSlab = 128;  // rows of E and F that stay in L2 while all rows of hidden states pass: 768 KB at d = 768
constexpr int64_t kGroup = 4;   // tokens that share one pass over a row's sums

inline int64_t aligned(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

constexpr int64_t kInvariantColumns = 4096;  // of a chunk, where that must not depend on the number of rows

// How the vocabulary is cut: chunks of about equal size whose buffers take kBufferBytes.
inline int64_t chunk_columns(int64_t vocabulary, int64_t values_per_column, int64_t value_bytes) {
  if (products.batch_invariant) return std::min(kInvariantColumns, aligned(vocabulary));
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

  // z + g of a row in place, whose noise is that of position `first_row` + i; returns the largest (NaN apart).
  A perturb(int64_t i, uint64_t seed, int64_t first_row) const {
    constexpr int64_t L = Vector<A>::lanes, kBlock = 1024;
    alignas(64) uint32_t words[kBlock];
    A* z = row(i);
    for (int64_t c = columns; c < aligned(columns); ++c) z[c] = -INFINITY;
    auto most = broadcast(A(-INFINITY));
    for (int64_t block = 0; block < columns; block += kBlock) {
      const int64_t n = std::min(kBlock, aligned(columns) - block);
      fill_words(words, seed, uint32_t(first_row + i), kGumbelStream, uint32_t((first + block) / 4), n);
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

// The bias, of any dtype and stride, long enough to be read in whole vectors; empty where there is none.
template <typename A>
std::vector<A> padded(const std::optional<Tensor>& bias) {
  if (!bias) return {};
  std::vector<A> values(aligned(bias->numel()) + kAlign);
  dispatch_floating(bias->scalar_type(), "gumbel_mix", [&](auto t) {
    const auto* given = static_cast<const decltype(t)*>(bias->data_ptr());
    for (int64_t i = 0; i < bias->numel(); ++i) values[i] = static_cast<A>(given[i * bias->stride(0)]);
  });
  return values;
}

struct Projection {
  const Tensor& weight;
  const std::optional<Tensor>& bias;
};

struct Noise {
  const Tensor& seed;
  double temperature;
  int64_t first_row;

  uint64_t key() const { return uint64_t(*static_cast<const int64_t*>(seed.data_ptr())); }

  template <typename A>
  A inverse_temperature() const {
    return A(std::min(1 / temperature, double(std::numeric_limits<A>::max())));  // ∞ · 0 would be NaN
  }
};

struct Drawn {
  const Tensor& token_ids;
  const Tensor& peak;
};

// Operands of one call, the same in both directions.
template <typename A>
struct Vocabulary {
  static constexpr ScalarType wide = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor& weight;
  const std::optional<Tensor> embedding;  // null: not needed
  ScalarType narrow;                       // what the products with the weight are taken of
  const Tensor& mixed;  // h̄ (M, d), wide
  Tensor logits;
  const std::vector<A> bias;
  int64_t size, columns;

  Vocabulary(const Tensor& mixed, ScalarType narrow, const Projection& projection,
             const std::optional<Tensor>& embedding)
      : weight(projection.weight),
        embedding(embedding),
        narrow(narrow),
        mixed(mixed),
        logits(mixed),
        bias(padded<A>(projection.bias)),
        size(weight.size(0)) {
    int64_t values = mixed.size(0);
    if (!is_operand(weight, wide) || narrow != wide) values += weight.size(1);
    if (embedding && !is_operand(*embedding, wide)) values += embedding->size(1);
    columns = chunk_columns(size, values, sizeof(A));
    logits = torch::stable::new_empty(mixed, {mixed.size(0), columns});
  }

  Tensor columns_of_logits(int64_t n) { return torch::stable::narrow(logits, 1, 0, n); }

  // f(chunk of logits, its rows of E, its rows of F) for each chunk in turn.
  template <typename F>
  void each_chunk(F&& f) {
    for (int64_t first = 0; first < size; first += columns) {
      const int64_t n = std::min(columns, size - first);
      const Tensor e = operand(rows_of(weight, first, n), narrow, wide);
      multiply(columns_of_logits(n), mixed, transposed(e));
      f(Chunk<A>{static_cast<A*>(logits.data_ptr()), columns, first, n, bias.empty() ? nullptr : bias.data()}, e,
        embedding ? operand(rows_of(*embedding, first, n), embedding->scalar_type(), wide) : e);
    }
  }
};

// Some rows of a matrix, as `operand` has them, each times a row of contiguous values.
template <typename A>
void row_products(const Tensor& matrix, const int64_t* rows, ScalarType narrow, const Rows<A>& values, A* out) {
  dispatch_floating(matrix.scalar_type(), "gumbel_mix", [&](auto t) {
    dispatch_floating(narrow, "gumbel_mix", [&](auto n) {
      using T = decltype(t);
      using N = decltype(n);
      const Rows<T> from(matrix);
      const int64_t d = from.columns;
      Buffer<A> buffer(d);
      for (int64_t i = 0; i < values.rows; ++i) {
        const A* row = read_row<T, A>(from.row(rows[i]), from.column_stride, d, buffer.data());
        if constexpr (!std::is_same_v<N, A> && !std::is_same_v<N, T>) {
          for (int64_t j = 0; j < d; ++j) buffer[j] = static_cast<A>(static_cast<N>(row[j]));
          row = buffer.data();
        }
        out[i] = dot(values.row(i), row, d);
      }
    });
  });
}

// The sample, as the sweeps over its y take it: y = peak · exp((z + g − origin)/τ), where origin is z + g of the drawn
// token and peak its y, the largest. Another sweep may round z otherwise and see a token above the drawn one, which at a
// small τ would be far above: it counts as equal.
template <typename A>
struct Sample {
  const int64_t* token;
  const A* peak;
  std::vector<A> origin;
  uint64_t seed;
  int64_t first_row;
  A inverse_temperature;

  Sample(const Vocabulary<A>& vocabulary, const Drawn& drawn, const Noise& noise)
      : token(static_cast<const int64_t*>(drawn.token_ids.data_ptr())),
        peak(static_cast<const A*>(drawn.peak.data_ptr())),
        origin(drawn.token_ids.size(0)),
        seed(noise.key()),
        first_row(noise.first_row),
        inverse_temperature(noise.inverse_temperature<A>()) {
    row_products(vocabulary.weight, token, vocabulary.narrow, Rows<A>(vocabulary.mixed), origin.data());
    for (int64_t i = 0; i < int64_t(origin.size()); ++i) {
      const int64_t t = token[i];
      uint32_t words[Vector<A>::lanes];
      const PhiloxWords drawn_words = philox(seed, uint32_t(t / 4), uint32_t(first_row + i), kGumbelStream);
      std::fill(words, words + Vector<A>::lanes, drawn_words.lane[t % 4]);
      origin[i] += gumbel_noise<A>(words)[0];
      if (!vocabulary.bias.empty()) origin[i] += vocabulary.bias[t];
    }
  }

  // z + g of a row of a chunk, with the drawn token's as the origin has it.
  void perturb(const Chunk<A>& z, int64_t i) const {
    z.perturb(i, seed, first_row);
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

// Call f with a value of the arithmetic type of tensors of `dtype`.
template <typename F>
void dispatch_wide(ScalarType dtype, F&& f) {
  dtype == ScalarType::Double ? f(double{}) : f(float{});
}

inline ScalarType wide_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// F[x̂] and Σ y F, gumbel_mix_value.cpp.
Tensor hard_values(const Tensor& embedding, const Drawn& drawn);
Tensor soft_values(const Tensor& mixed, ScalarType narrow, const Projection& projection, const Tensor& embedding,
                   const Drawn& drawn, const Noise& noise);

}  // namespace repdeg_fast::gumbel_mix
