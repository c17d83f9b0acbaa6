// Samples of a mixture of heads: forward passes, and samples from logits that something else has made.
#include <torch/csrc/stable/library.h>

#include "gumbel_mix.h"
#include "gumbel_mix_heads.h"

namespace repdeg_fast::gumbel_mix {
namespace {

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
void sample(const Drawn& drawn, const Tensor& mixed, ScalarType narrow, const Projection& projection,
            const Noise& noise) {
  const int64_t m = mixed.size(0);
  const A inverse_temperature = noise.inverse_temperature<A>();
  Vocabulary<A> vocabulary(mixed, narrow, projection, std::nullopt);
  std::vector<RowState<A>> state(m);
  int64_t* tokens = static_cast<int64_t*>(drawn.token_ids.data_ptr());
  std::fill(tokens, tokens + m, int64_t(0));
  vocabulary.each_chunk([&](const Chunk<A>& z, const Tensor&, const Tensor&) {
    torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A most = z.perturb(i, noise.key(), noise.first_row);
        state[i].take(z.row(i), z.columns, most, inverse_temperature, z.first, tokens + i);
      }
    });
  });
  A* out = static_cast<A*>(drawn.peak.data_ptr());
  for (int64_t i = 0; i < m; ++i) out[i] = state[i].peak();
}

// The same from the logits of K heads. Bandwidth: they are read once; their mixture, one row of the vocabulary, stays in
// L2 while noise is added and it is looked at.
template <typename T, typename A>
void sample_logits(const Drawn& drawn, const Tensor& logits, const std::optional<Tensor>& mixture_logits,
                   const std::optional<Tensor>& bias_tensor, const Noise& noise) {
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t heads = logits.size(0), m = logits.size(1), size = logits.size(2);
  const T* z = static_cast<const T*>(logits.data_ptr());
  const std::vector<A> alpha = mixture_weights<A>(mixture_logits, m);
  const std::vector<A> bias = padded<A>(bias_tensor);
  int64_t* tokens = static_cast<int64_t*>(drawn.token_ids.data_ptr());
  A* out = static_cast<A*>(drawn.peak.data_ptr());
  torch::stable::parallel_for(0, m, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> mixed(aligned(size));
    const Chunk<A> row{mixed.data(), 0, 0, size, bias.empty() ? nullptr : bias.data()};
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = 0; k < heads; ++k) {
        const T* from = z + k * logits.stride(0) + i * logits.stride(1);
        const A weight = alpha[i * heads + k];
        int64_t c = 0;
        for (; c + L <= size; c += L) {
          const auto added = weight * load_values(from + c);
          store(mixed.data() + c, k ? load(mixed.data() + c) + added : added);
        }
        for (; c < size; ++c) mixed[c] = weight * static_cast<A>(from[c]) + (k ? mixed[c] : A(0));
      }
      tokens[i] = 0;
      RowState<A> state;
      state.take(mixed.data(), size, row.perturb(i, noise.key(), noise.first_row), noise.inverse_temperature<A>(), 0,
                 tokens + i);
      out[i] = state.peak();
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& hidden_states, const std::optional<Tensor>& mixture_logits,
                                           const Tensor& weight, const std::optional<Tensor>& bias,
                                           const Tensor& embedding, const Tensor& seed, double temperature,
                                           int64_t first_row, bool hard) {
  const ScalarType narrow = hidden_states.scalar_type(), wide = wide_of(narrow);
  const int64_t m = hidden_states.size(1);
  const Tensor token_ids = torch::stable::new_empty(hidden_states, {m}, ScalarType::Long);
  const Tensor peak = torch::stable::new_empty(hidden_states, {m}, wide);
  const Drawn drawn{token_ids, peak};
  const Projection projection{weight, bias};
  const Noise noise{seed, temperature, first_row};
  Tensor values = peak;
  dispatch_wide(wide, [&](auto a) {
    using A = decltype(a);
    const Tensor mixed = mix<A>(hidden_states, mixture_logits, wide);
    sample<A>(drawn, mixed, narrow, projection, noise);
    values = hard ? hard_values(embedding, drawn)
                  : soft_values(mixed, narrow, projection, embedding, drawn, noise);
  });
  return {values, token_ids, peak};
}

void sample_from(Tensor token_ids, Tensor peak, const Tensor& logits, const std::optional<Tensor>& mixture_logits,
                 const std::optional<Tensor>& bias, const Tensor& seed, double temperature, int64_t first_row) {
  dispatch_floating(logits.scalar_type(), "gumbel_mix_sample_logits", [&](auto t) {
    using T = decltype(t);
    using A = typename Arithmetic<T>::type;
    sample_logits<T, A>({token_ids, peak}, logits, mixture_logits, bias, {seed, temperature, first_row});
  });
}

}  // namespace
}  // namespace repdeg_fast::gumbel_mix

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("gumbel_mix_forward", TORCH_BOX(&repdeg_fast::gumbel_mix::forward));
  m.impl("gumbel_mix_sample_logits", TORCH_BOX(&repdeg_fast::gumbel_mix::sample_from));
}
