// The mixture of K heads: α = softmax(mixture logits), h̄ = Σ_k α_k h^(k), and its gradient.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "vector_math.h"

namespace repdeg_fast::gumbel_mix {

// α (M, K), from logits of any dtype and strides; without them K is 1.
template <typename A>
std::vector<A> mixture_weights(const std::optional<Tensor>& logits, int64_t m) {
  if (!logits) return std::vector<A>(m, A(1));
  const int64_t heads = logits->size(1);
  std::vector<A> alpha(m * heads);
  dispatch_floating(logits->scalar_type(), "gumbel_mix", [&](auto t) {
    const Rows<decltype(t)> rows(*logits);
    for (int64_t i = 0; i < m; ++i) {
      A* a = alpha.data() + i * heads;
      A most = -INFINITY, sum = 0;
      for (int64_t k = 0; k < heads; ++k) {
        a[k] = static_cast<A>(rows.row(i)[k * rows.column_stride]);
        most = std::max(most, a[k]);
      }
      for (int64_t k = 0; k < heads; ++k) sum += a[k] = std::exp(a[k] - most);
      for (int64_t k = 0; k < heads; ++k) a[k] /= sum;
    }
  });
  return alpha;
}

// A row h^(k) of position i as contiguous arithmetic values: where it lies, or in `buffer`.
template <typename T, typename A>
const A* head_row(const Tensor& hidden_states, int64_t k, int64_t i, A* buffer) {
  const T* data = static_cast<const T*>(hidden_states.data_ptr());
  const T* row = data + k * hidden_states.stride(0) + i * hidden_states.stride(1);
  return read_row<T, A>(row, hidden_states.stride(2), hidden_states.size(2), buffer);
}

// h̄ (M, d), wide, rounded to the dtype of the hidden states (K, M, d).
template <typename A>
Tensor mix(const Tensor& hidden_states, const std::optional<Tensor>& mixture_logits, ScalarType wide) {
  const int64_t heads = hidden_states.size(0), m = hidden_states.size(1), d = hidden_states.size(2);
  const std::vector<A> alpha = mixture_weights<A>(mixture_logits, m);
  const Tensor mixed = torch::stable::new_empty(hidden_states, {m, d}, wide);
  dispatch_floating(hidden_states.scalar_type(), "gumbel_mix", [&](auto t) {
    using T = decltype(t);
    torch::stable::parallel_for(0, m, 16, [&](int64_t begin, int64_t end) {
      Buffer<A> buffer(d);
      for (int64_t i = begin; i < end; ++i) {
        A* out = static_cast<A*>(mixed.data_ptr()) + i * d;
        for (int64_t k = 0; k < heads; ++k) {
          const A* row = head_row<T, A>(hidden_states, k, i, buffer.data());
          const A share = alpha[i * heads + k];
          for (int64_t j = 0; j < d; ++j) out[j] = k ? out[j] + share * row[j] : share * row[j];
        }
        if constexpr (!std::is_same_v<T, A>)
          for (int64_t j = 0; j < d; ++j) out[j] = static_cast<A>(static_cast<T>(out[j]));
      }
    });
  });
  return mixed;
}

// The gradient of the mixture logits, in their dtype, times `scale`, from that of h̄.
template <typename A>
Tensor mix_backward(const Tensor& grad_mixed, const Tensor& hidden_states, const Tensor& mixture_logits, A scale) {
  const int64_t heads = hidden_states.size(0), m = hidden_states.size(1), d = hidden_states.size(2);
  const std::vector<A> alpha = mixture_weights<A>(mixture_logits, m);
  std::vector<A> grad(m * heads);
  dispatch_floating(hidden_states.scalar_type(), "gumbel_mix", [&](auto t) {
    torch::stable::parallel_for(0, m, 16, [&](int64_t begin, int64_t end) {
      Buffer<A> buffer(d);
      for (int64_t i = begin; i < end; ++i) {
        const A* g = static_cast<const A*>(grad_mixed.data_ptr()) + i * d;
        A mean = 0;
        for (int64_t k = 0; k < heads; ++k) {
          const A* row = head_row<decltype(t), A>(hidden_states, k, i, buffer.data());
          grad[i * heads + k] = scale * dot(g, row, d);
          mean += alpha[i * heads + k] * grad[i * heads + k];
        }
        for (int64_t k = 0; k < heads; ++k)
          grad[i * heads + k] = alpha[i * heads + k] * (grad[i * heads + k] - mean);
      }
    });
  });
  const Tensor out = torch::stable::new_empty(mixture_logits, {m, heads});
  dispatch_floating(out.scalar_type(), "gumbel_mix", [&](auto t) {
    using T = decltype(t);
    for (int64_t i = 0; i < m * heads; ++i) static_cast<T*>(out.data_ptr())[i] = static_cast<T>(grad[i]);
  });
  return out;
}

}  // namespace repdeg_fast::gumbel_mix
