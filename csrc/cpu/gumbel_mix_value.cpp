// What a sample is worth: the drawn tokens' rows of the embedding, or the soft value Σ y F.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "gumbel_mix.h"

namespace repdeg_fast::gumbel_mix {
namespace {

// Σ y F, divided by what y adds up to: 1, but for tokens that count as equal to the drawn one.
template <typename A>
void soft(const Tensor& sums, const Tensor& mixed, ScalarType narrow, const Projection& projection,
          const Tensor& embedding, const Drawn& drawn, const Noise& noise) {
  const int64_t m = mixed.size(0);
  Vocabulary<A> vocabulary(mixed, narrow, projection, embedding);
  const Sample<A> sample(vocabulary, drawn, noise);
  std::vector<A> total(m);
  vocabulary.each_chunk([&](const Chunk<A>& z, const Tensor&, const Tensor& f) {
    torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sample.perturb(z, i);
      for (int64_t i = begin; i < end; ++i) total[i] += sample.write_weights(z, i);
    });
    multiply(sums, vocabulary.columns_of_logits(z.columns), f, z.first > 0);
  });
  const Rows<A> out(sums);
  for (int64_t i = 0; i < m; ++i) {
    const A divisor = std::isfinite(sample.peak[i]) ? total[i] : A(NAN);  // a token was drawn all the same
    for (int64_t j = 0; j < out.columns; ++j) out.row(i)[j] /= divisor;
  }
}

Tensor embed(const Tensor& embedding, const Tensor& token_ids, const Tensor& peak) {
  return hard_values(embedding, {token_ids, peak});
}

}  // namespace

Tensor hard_values(const Tensor& embedding, const Drawn& drawn) {
  const int64_t m = drawn.token_ids.size(0), d = embedding.size(1);
  const Tensor values = torch::stable::new_empty(embedding, {m, d});
  const int64_t* tokens = static_cast<const int64_t*>(drawn.token_ids.data_ptr());
  dispatch_floating(embedding.scalar_type(), "gumbel_mix_embed", [&](auto t) {
    using T = decltype(t);
    using A = typename Arithmetic<T>::type;
    const Rows<T> from(embedding), out(values);
    dispatch_wide(drawn.peak.scalar_type(), [&](auto a) {
      const auto* peak = static_cast<const decltype(a)*>(drawn.peak.data_ptr());
      torch::stable::parallel_for(0, m, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const T* row = from.row(tokens[i]);
          T* value = out.row(i);
          if (!std::isfinite(peak[i])) {  // a token was drawn even where a logit is NaN; the value says so
            std::fill(value, value + d, static_cast<T>(A(NAN)));
          } else if (from.column_stride == 1) {
            std::copy(row, row + d, value);
          } else {
            for (int64_t j = 0; j < d; ++j) value[j] = row[j * from.column_stride];
          }
        }
      });
    });
  });
  return values;
}

Tensor soft_values(const Tensor& mixed, ScalarType narrow, const Projection& projection, const Tensor& embedding,
                   const Drawn& drawn, const Noise& noise) {
  const Tensor sums = torch::stable::new_empty(mixed, {mixed.size(0), embedding.size(1)});
  dispatch_wide(mixed.scalar_type(), [&](auto a) {
    soft<decltype(a)>(sums, mixed, narrow, projection, embedding, drawn, noise);
  });
  return sums.scalar_type() == embedding.scalar_type() ? sums : torch::stable::to(sums, embedding.scalar_type());
}

}  // namespace repdeg_fast::gumbel_mix

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("gumbel_mix_embed", TORCH_BOX(&repdeg_fast::gumbel_mix::embed));
}
