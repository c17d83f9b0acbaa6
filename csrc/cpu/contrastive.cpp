// The row pass of the contrastive loss on the CPU. Mathematics: repdeg_fast/reference/contrastive.py.
//
// One (R, W) buffer of products comes from the GEMM and goes to the next GEMM as its gradient: read once, written once.
// A row of it and its logits (64 KB each at W = 16,384 in fp32) stay in L2 between the looks that a softmax needs.
// Scales of rows and columns are those of cosines: neither operand of the GEMMs is ever normalized in memory.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "softmax.h"

namespace repdeg_fast {
namespace {

struct Settings {
  double multiplier, slope, positive_factor, own_factor;  // own_factor 0: own columns are masked
  int64_t period;                                         // 0: one own column
  bool softmax_known, has_target;
};

// A row's own id, and those of the first columns; no ids: count is 0.
struct Ids {
  const int64_t* rows = nullptr;
  const int64_t* columns = nullptr;
  int64_t count = 0;

  Ids(const std::optional<Tensor>& row_ids, const std::optional<Tensor>& column_ids) {
    if (!row_ids) return;
    rows = static_cast<const int64_t*>(row_ids->data_ptr());
    columns = static_cast<const int64_t*>(column_ids->data_ptr());
    count = column_ids->size(0);
  }
};

template <typename T>
struct RowPass {
  using A = typename Arithmetic<T>::type;
  Rows<T> scores;
  A *origin, *total;
  const A *row_scale, *column_scale, *threshold, *grad_loss;  // each may be null
  const int64_t *positive, *own;                              // own may be null
  Ids query_ids, document_ids;
  Settings settings;

  void run(int64_t r, A* z) const {
    const int64_t n = scores.columns;
    const A row = row_scale ? row_scale[r] : A(1);
    read_logits(r, row * A(settings.multiplier), z);
    if (!settings.softmax_known) {
      const auto softmax = Softmax<A>::of(z, n);
      origin[r] = softmax.origin;
      total[r] = softmax.sum;
    }
    if (!grad_loss) return;
    const A upstream = grad_loss[r] * A(settings.slope) * row;
    write_gradient(z, origin[r], upstream / total[r], scores.row(r));
    if (!settings.has_target) return;
    const int64_t at = positive[r];
    const A p = exp_scalar(z[at] - origin[r]) / total[r];
    scores.row(r)[at] = static_cast<T>(upstream * (p - 1) * (column_scale ? column_scale[at] : A(1)));
  }

  void read_logits(int64_t r, A factor, A* z) const {
    constexpr int64_t L = Vector<A>::lanes;
    const int64_t n = scores.columns, at = positive[r];
    const T* values = scores.row(r);
    const A most = threshold ? threshold[r] : A(INFINITY);
    const auto masked = broadcast(A(-INFINITY));
    int64_t i = 0;
    for (; i + L <= n; i += L) {
      auto v = load_values(values + i) * factor;
      if (column_scale) v *= load(column_scale + i);
      store(z + i, v > most ? masked : v);
    }
    for (; i < n; ++i) {
      const A v = logit(values, factor, i);
      z[i] = v > most ? A(-INFINITY) : v;
    }
    mask(query_ids, r, z);
    mask(document_ids, r, z);
    const A own_factor = A(settings.own_factor);
    if (own && own_factor) for_own(r, [&](int64_t j) { z[j] *= own_factor; });
    z[at] = logit(values, factor, at) * A(settings.positive_factor);
    if (own && !own_factor) for_own(r, [&](int64_t j) { z[j] = -INFINITY; });
  }

  A logit(const T* values, A factor, int64_t i) const {
    const A v = static_cast<A>(values[i]) * factor;
    return column_scale ? v * column_scale[i] : v;
  }

  static void mask(const Ids& ids, int64_t r, A* z) {
    for (int64_t i = 0; i < ids.count; ++i) z[i] = ids.columns[i] == ids.rows[r] ? A(-INFINITY) : z[i];
  }

  template <typename F>
  void for_own(int64_t r, F&& f) const {
    const int64_t step = settings.period ? settings.period : scores.columns;
    for (int64_t j = own[r]; j < scores.columns; j += step) f(j);
  }

  void write_gradient(const A* z, A zero, A scale, T* out) const {
    constexpr int64_t L = Vector<A>::lanes;
    const int64_t n = scores.columns;
    int64_t i = 0;
    for (; i + L <= n; i += L) {
      auto g = scale * exp(load(z + i) - zero);
      if (column_scale) g *= load(column_scale + i);
      store_values(out + i, g);
    }
    for (; i < n; ++i) {
      const A g = scale * exp_scalar(z[i] - zero);
      out[i] = static_cast<T>(column_scale ? g * column_scale[i] : g);
    }
  }
};

template <typename A>
A* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<A*>(t->data_ptr()) : nullptr;
}

// See the schema in registration.cpp. All vectors are contiguous, the scores along their rows.
void contrastive_rows(Tensor scores, Tensor origin, Tensor total, const std::optional<Tensor>& row_scale,
                      const std::optional<Tensor>& column_scale, const Tensor& positive,
                      const std::optional<Tensor>& own, const std::optional<Tensor>& threshold,
                      const std::optional<Tensor>& row_query_ids, const std::optional<Tensor>& column_query_ids,
                      const std::optional<Tensor>& row_document_ids,
                      const std::optional<Tensor>& column_document_ids, const std::optional<Tensor>& grad_loss,
                      double multiplier, double slope, double positive_factor, double own_factor, int64_t period,
                      bool softmax_known, bool has_target) {
  dispatch_floating(scores.scalar_type(), "contrastive_rows", [&](auto t) {
    using T = decltype(t);
    using A = typename Arithmetic<T>::type;
    const RowPass<T> pass{Rows<T>(scores),
                          static_cast<A*>(origin.data_ptr()),
                          static_cast<A*>(total.data_ptr()),
                          data_or_null<A>(row_scale),
                          data_or_null<A>(column_scale),
                          data_or_null<A>(threshold),
                          data_or_null<A>(grad_loss),
                          static_cast<const int64_t*>(positive.data_ptr()),
                          data_or_null<int64_t>(own),
                          Ids(row_query_ids, column_query_ids),
                          Ids(row_document_ids, column_document_ids),
                          {multiplier, slope, positive_factor, own_factor, period, softmax_known, has_target}};
    torch::stable::parallel_for(0, pass.scores.rows, 1, [&](int64_t begin, int64_t end) {
      Buffer<A> z(pass.scores.columns);
      for (int64_t r = begin; r < end; ++r) pass.run(r, z.data());
    });
  });
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("contrastive_rows", TORCH_BOX(&repdeg_fast::contrastive_rows));
}
