// The row kernels of the measures over pairs on the CPU. Mathematics: repdeg_fast/reference/pairwise.py.
//
// One (R, W) buffer of cosines comes from the GEMM and goes to the next two GEMMs as slopes: read once and written once.
// What is left out of a row — its own column, or all up to it — is no mask but where the loop starts.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "vector_math.h"

namespace repdeg_fast {
namespace {

enum Kind { kSquare, kAbs, kRelu, kExp };          // as in repdeg_fast/contracts/pairwise.py
enum LeftOut { kNothing, kOwn, kLower };

// φ(c) and φ'(c) of a vector; NaN stays NaN in both.
template <Kind kind, typename A>
struct Phi {
  using V = typename Vector<A>::type;
  A parameter, origin;

  V value(V c) const {
    if constexpr (kind == kSquare) return c * c;
    if constexpr (kind == kAbs) return c < A(0) ? -c : c;
    if constexpr (kind == kRelu) {
      const V above = c - parameter;
      return above <= A(0) ? V{} : above;
    }
    if constexpr (kind == kExp) return exp(V(parameter * c - origin));
  }

  V slope(V c, V value) const {
    if constexpr (kind == kSquare) return A(2) * c;
    if constexpr (kind == kAbs) return c > A(0) ? broadcast(A(1)) : c < A(0) ? broadcast(A(-1)) : c;
    if constexpr (kind == kRelu) return value > A(0) ? broadcast(A(1)) : value;
    if constexpr (kind == kExp) return value;
  }
};

// For a zero row: its cosines are 0, or NaN where the other vector is, and stay what they are.
struct Nothing {
  template <typename V>
  V value(V c) const { return c; }
  template <typename V>
  V slope(V c, V) const { return c; }
};

// Σ φ of columns [begin, end) of a row, whose cosines become slopes; those of zero columns stay, like a zero row's.
template <bool slopes, typename T, typename A, typename F>
A measure_columns(T* row, const A* keep, int64_t begin, int64_t end, const F& phi) {
  constexpr int64_t L = Vector<A>::lanes;
  using V = typename Vector<A>::type;
  V sum[2] = {};
  int64_t i = begin;
  for (; i + 2 * L <= end; i += 2 * L)
    for (int64_t k = 0; k < 2; ++k) {
      const V c = load_values(row + i + k * L), value = phi.value(c), kept = load(keep + i + k * L);
      sum[k] += kept == A(0) ? c : value;
      if constexpr (slopes) store_values(row + i + k * L, V(kept == A(0) ? c : phi.slope(c, value)));
    }
  for (; i < end; i += L) {
    const int64_t rest = std::min(L, end - i);
    V c = {}, kept = {};
    for (int64_t k = 0; k < rest; ++k) c[k] = static_cast<A>(row[i + k]), kept[k] = keep[i + k];
    const V value = phi.value(c), slope = kept == A(0) ? c : phi.slope(c, value);
    sum[0] += kept == A(0) ? c : value;
    if constexpr (slopes)
      for (int64_t k = 0; k < rest; ++k) row[i + k] = static_cast<T>(slope[k]);
  }
  const V all = sum[0] + sum[1];
  A total = 0;
  for (int64_t k = 0; k < L; ++k) total += all[k];
  return total;
}

template <bool slopes, typename T, typename A, typename F>
A measure_row(T* row, const A* keep, int64_t own, int64_t n, int64_t left_out, const F& phi) {
  if (left_out == kNothing) return measure_columns<slopes>(row, keep, 0, n, phi);
  own = std::min(own, n);
  const int64_t next = std::min(own + 1, n), begin = left_out == kOwn ? own : 0;
  const A before = measure_columns<slopes>(row, keep, 0, begin, phi);
  if constexpr (slopes) std::fill(row + begin, row + next, T(0));
  return before + measure_columns<slopes>(row, keep, next, n, phi);
}

template <Kind kind, bool slopes, typename T, typename A>
void measure_rows(const Rows<T>& rows, A* sums, const A* keep_rows, const A* keep, Phi<kind, A> phi, int64_t diagonal,
                  int64_t left_out) {
  torch::stable::parallel_for(0, rows.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const auto run = [&](const auto& f) {
        return measure_row<slopes>(rows.row(r), keep, diagonal + r, rows.columns, left_out, f);
      };
      sums[r] = keep_rows[r] == A(0) ? run(Nothing{}) : run(phi);
    }
  });
}

// The largest value so far of each lane and where it was; NaN is larger than all else, the first of equals stays.
template <typename A>
struct Largest {
  using V = typename Vector<A>::type;
  using I = decltype(V{} > V{});
  static constexpr int64_t L = Vector<A>::lanes;
  V best = broadcast(A(-INFINITY));
  I at = I{} - 1;

  void look(V c, I columns) {
    const I better = (c > best) | ((c != c) & (best == best));
    best = better ? c : best;
    at = better ? columns : at;
  }

  template <typename T>
  void look(const T* row, const A* keep, int64_t begin, int64_t end) {
    I lanes;
    for (int64_t k = 0; k < L; ++k) lanes[k] = k;
    const V nothing = broadcast(A(-INFINITY));
    int64_t i = begin;
    for (; i + L <= end; i += L) {
      const V c = load_values(row + i);
      look(load(keep + i) == A(0) ? nothing : c, lanes + decltype(lanes[0] + 0)(i));
    }
    V c = nothing;
    for (int64_t k = 0; k < end - i; ++k) c[k] = keep[i + k] == A(0) ? A(-INFINITY) : static_cast<A>(row[i + k]);
    if (i < end) look(c, lanes + decltype(lanes[0] + 0)(i));
  }

  void write(A* value, int64_t* index) const {
    int64_t k = 0;
    for (int64_t j = 1; j < L; ++j) {
      const bool nan = std::isnan(best[j]), first = at[j] >= 0 && (at[k] < 0 || at[j] < at[k]);
      if (nan == std::isnan(best[k]) ? best[j] > best[k] || ((nan || best[j] == best[k]) && first) : nan) k = j;
    }
    *index = at[k];
    *value = at[k] < 0 ? A(0) : best[k];
  }
};

template <typename A>
A* data(const Tensor& t) {
  return static_cast<A*>(t.data_ptr());
}

// f(integral constant) for one of the four kinds.
template <typename F>
void dispatch_kind(int64_t kind, F&& f) {
  switch (kind) {
    case kSquare: return f(std::integral_constant<Kind, kSquare>{});
    case kAbs: return f(std::integral_constant<Kind, kAbs>{});
    case kRelu: return f(std::integral_constant<Kind, kRelu>{});
    default: return f(std::integral_constant<Kind, kExp>{});
  }
}

// See the schemas in registration.cpp. Cosines are contiguous along their rows, everything else is contiguous.
void pairwise_measure(Tensor cosines, Tensor sums, const Tensor& keep_rows, const Tensor& keep_columns,
                      const Tensor& origin, int64_t kind, double parameter, int64_t diagonal, int64_t left_out,
                      bool slopes) {
  dispatch_floating(cosines.scalar_type(), "pairwise_measure", [&](auto t) {
    using T = decltype(t);
    using A = typename Arithmetic<T>::type;
    dispatch_kind(kind, [&](auto k) {
      const Phi<k(), A> phi{A(parameter), *data<A>(origin)};
      const auto run = slopes ? measure_rows<k(), true, T, A> : measure_rows<k(), false, T, A>;
      run(Rows<T>(cosines), data<A>(sums), data<A>(keep_rows), data<A>(keep_columns), phi, diagonal, left_out);
    });
  });
}

void pairwise_maxima(Tensor values, Tensor index, const Tensor& cosines, const Tensor& keep_columns, int64_t diagonal,
                     int64_t left_out) {
  dispatch_floating(cosines.scalar_type(), "pairwise_maxima", [&](auto t) {
    using T = decltype(t);
    using A = typename Arithmetic<T>::type;
    const Rows<T> rows(cosines);
    const A* keep = data<A>(keep_columns);
    const int64_t n = rows.columns;
    torch::stable::parallel_for(0, rows.rows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        Largest<A> largest;
        const int64_t own = left_out == kOwn ? std::min(diagonal + r, n) : n;
        largest.look(rows.row(r), keep, 0, own);
        largest.look(rows.row(r), keep, std::min(own + 1, n), n);
        largest.write(data<A>(values) + r, data<int64_t>(index) + r);
      }
    });
  });
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("pairwise_measure", TORCH_BOX(&repdeg_fast::pairwise_measure));
  m.impl("pairwise_maxima", TORCH_BOX(&repdeg_fast::pairwise_maxima));
}
