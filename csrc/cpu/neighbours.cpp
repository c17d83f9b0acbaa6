// The k largest cosines of each point so far, on the CPU. Mathematics: repdeg_fast/reference/neighbours.py.
//
// A tile of cosines is read while it is hot, and almost all of it is smaller than the least of what its point has: 64
// values are compared at once, and only a hit looks closer. What a point has is a heap whose root is its least, of equal
// ones the last: among those that come later, in ascending order, only a larger one takes its place.
#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace repdeg_fast {
namespace {

constexpr int64_t kLook = 4;       // vectors that are compared at once
constexpr int64_t kStrip = 256;    // points whose thresholds are at hand, where points are columns

// Whether any lane is set.
template <typename I>
bool any(I mask) {
  typedef int64_t Words __attribute__((vector_size(64), may_alias));
  const Words w = reinterpret_cast<Words&>(mask);
  return ((w[0] | w[1]) | (w[2] | w[3])) | ((w[4] | w[5]) | (w[6] | w[7]));
}

template <typename A>
struct Heap {
  A* values;
  int64_t* index;
  int64_t k;

  // Whether entry i should leave before entry j.
  bool worse(int64_t i, int64_t j) const {
    return values[i] < values[j] || (values[i] == values[j] && index[i] > index[j]);
  }

  // In place of the root, which is smaller. Returns the new root's value.
  A replace(A value, int64_t at) {
    values[0] = value, index[0] = at;
    for (int64_t i = 0;;) {
      int64_t least = i;
      for (int64_t child = 2 * i + 1; child <= std::min(2 * i + 2, k - 1); ++child)
        if (worse(child, least)) least = child;
      if (least == i) return values[0];
      std::swap(values[i], values[least]), std::swap(index[i], index[least]);
      i = least;
    }
  }
};

// f(i) for those i < n, in turn, where row[i] > threshold(i); f may raise thresholds.
template <typename A, typename V, typename F>
void for_larger(const A* row, int64_t n, const V& threshold, F&& f) {
  constexpr int64_t L = Vector<A>::lanes, step = kLook * L;
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    auto mask = load(row + i) > threshold.vector(i);
    for (int64_t k = 1; k < kLook; ++k) mask |= load(row + i + k * L) > threshold.vector(i + k * L);
    if (!any(mask)) continue;
    for (int64_t j = i; j < i + step; j += L) {
      if (!any(load(row + j) > threshold.vector(j))) continue;
      for (int64_t lane = j; lane < j + L; ++lane)
        if (row[lane] > threshold.value(lane)) f(lane);
    }
  }
  for (; i < n; ++i)
    if (row[i] > threshold.value(i)) f(i);
}

template <typename A>
struct OneThreshold {
  A least;
  typename Vector<A>::type vector(int64_t) const { return typename Vector<A>::type{} + least; }
  A value(int64_t) const { return least; }
};

template <typename A>
struct Thresholds {
  A least[kStrip];
  typename Vector<A>::type vector(int64_t i) const { return load(least + i); }
  A value(int64_t i) const { return least[i]; }
};

template <typename A>
Heap<A> heap(const Rows<A>& values, const Rows<int64_t>& index, int64_t point) {
  return {values.row(point), index.row(point), values.columns};
}

template <typename A>
void look_along_rows(const Rows<A>& values, const Rows<int64_t>& index, const Rows<A>& cosines, int64_t first) {
  torch::stable::parallel_for(0, cosines.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Heap<A> best = heap(values, index, r);
      const A* row = cosines.row(r);
      OneThreshold<A> threshold{best.values[0]};
      for_larger(row, cosines.columns, threshold,
                 [&](int64_t i) { threshold.least = best.replace(row[i], first + i); });
    }
  });
}

template <typename A>
void look_along_columns(const Rows<A>& values, const Rows<int64_t>& index, const Rows<A>& cosines, int64_t first) {
  const int64_t points = cosines.rows;
  torch::stable::parallel_for(0, (points + kStrip - 1) / kStrip, 1, [&](int64_t begin, int64_t end) {
    for (int64_t start = begin * kStrip; start < std::min(points, end * kStrip); start += kStrip) {
      const int64_t width = std::min(kStrip, points - start);
      Thresholds<A> threshold;
      for (int64_t i = 0; i < width; ++i) threshold.least[i] = values.row(start + i)[0];
      for (int64_t c = 0; c < cosines.columns; ++c) {
        const A* row = cosines.data + c * cosines.column_stride + start;
        for_larger(row, width, threshold, [&](int64_t i) {
          threshold.least[i] = heap(values, index, start + i).replace(row[i], first + c);
        });
      }
    }
  });
}

template <typename A>
void look(const Tensor& values, const Tensor& index, const Tensor& cosines, int64_t first) {
  const Rows<A> tile(cosines);
  const auto run = tile.column_stride == 1 ? look_along_rows<A> : look_along_columns<A>;
  run(Rows<A>(values), Rows<int64_t>(index), tile, first);
}

// See the schema in registration.cpp. Cosines are contiguous along their rows or their columns, of the dtype of values;
// values and index are contiguous along their rows.
void neighbours_look(Tensor values, Tensor index, const Tensor& cosines, int64_t first) {
  const bool is_double = cosines.scalar_type() == ScalarType::Double;
  (is_double ? look<double> : look<float>)(values, index, cosines, first);
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("neighbours_look", TORCH_BOX(&repdeg_fast::neighbours_look));
}
