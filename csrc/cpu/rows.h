// What every row-wise CPU kernel needs: fixed-order vector arithmetic, rows of any dtype and stride, dtype dispatch.
//
// Sums use a fixed number of vector accumulators added in a fixed order, and work is cut into blocks by size, never by
// thread count, so that a result does not change with the number of threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace repdeg_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 64 bytes of A: one AVX-512 register, or as many smaller ones as the host needs.
template <typename A>
struct Vector {
  typedef A type __attribute__((vector_size(64), aligned(alignof(A)), may_alias));
  static constexpr int64_t lanes = 64 / sizeof(A);
};

template <typename A>
inline typename Vector<A>::type load(const A* p) {
  return *reinterpret_cast<const typename Vector<A>::type*>(p);
}

template <typename A>
inline void store(A* p, typename Vector<A>::type v) {
  *reinterpret_cast<typename Vector<A>::type*>(p) = v;
}

// Storage that starts on a cache line, as rows of tensors mostly do: vectors that straddle two lines cost double.
template <typename A>
struct CacheLineAllocator {
  using value_type = A;
  static constexpr std::align_val_t kLine{64};
  CacheLineAllocator() = default;
  template <typename B>
  CacheLineAllocator(const CacheLineAllocator<B>&) {}
  A* allocate(size_t n) { return static_cast<A*>(::operator new(n * sizeof(A), kLine)); }
  void deallocate(A* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const CacheLineAllocator&) const { return true; }
  bool operator!=(const CacheLineAllocator&) const { return false; }
};

template <typename A>
using Buffer = std::vector<A, CacheLineAllocator<A>>;

// x·y. Four independent accumulators hide the latency of the multiply-add.
template <typename A>
inline A dot(const A* x, const A* y, int64_t d) {
  constexpr int64_t L = Vector<A>::lanes;
  typename Vector<A>::type sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= d; i += 4 * L)
    for (int k = 0; k < 4; ++k) sum[k] += load(x + i + k * L) * load(y + i + k * L);
  for (; i + L <= d; i += L) sum[0] += load(x + i) * load(y + i);
  A total = 0;
  for (; i < d; ++i) total += x[i] * y[i];
  const typename Vector<A>::type all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (int64_t k = 0; k < L; ++k) total += all[k];
  return total;
}

// The arithmetic type of a storage type: double for double, float for the rest.
template <typename T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

// A row as contiguous arithmetic values: the row itself where it already is one, else a copy in `buffer` (d values).
template <typename T, typename A>
inline const A* read_row(const T* row, int64_t stride, int64_t d, A* buffer) {
  if constexpr (std::is_same_v<T, A>) {
    if (stride == 1) return row;
  }
  if (stride == 1) {
    for (int64_t i = 0; i < d; ++i) buffer[i] = static_cast<A>(row[i]);
  } else {
    for (int64_t i = 0; i < d; ++i) buffer[i] = static_cast<A>(row[i * stride]);
  }
  return buffer;
}

// A new tensor on the CPU, contiguous. Past the dispatcher, which is slower than a small kernel.
inline Tensor empty(std::initializer_list<int64_t> size, ScalarType type) {
  std::vector<int64_t> strides(size.size(), 1);
  for (size_t i = size.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(size.begin()[i], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(size.size(), size.begin(), strides.data(), int32_t(type),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Call f with a value of the C++ type of `dtype`.
template <typename F>
inline void dispatch_floating(ScalarType dtype, const char* what, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, what, ": expected float32, float64, bfloat16 or float16");
  }
}

// A large tensor fresh from the allocator has no pages yet, and taking them 4 KiB at a time costs more than computing
// what goes there. Asking for 2 MiB pages first is a hint: it changes no contents and fails harmlessly. It is for
// passes that take no longer than the faults, and for memory that is kept: some virtual machines give free 2 MiB blocks
// back to their host, and wait 2 ms for each that is needed again.
inline void advise_huge_pages(const Tensor& fresh) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t last = (start + uintptr_t(fresh.numel()) * fresh.element_size()) / kPage * kPage;
  if (fresh.is_contiguous() && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// A matrix as the kernels see it: typed base pointer and both strides, in elements.
template <typename T>
struct Rows {
  T* data;
  int64_t rows, columns, row_stride, column_stride;

  explicit Rows(const Tensor& t)
      : data(static_cast<T*>(t.data_ptr())),
        rows(t.size(0)),
        columns(t.size(1)),
        row_stride(t.stride(0)),
        column_stride(t.stride(1)) {}

  T* row(int64_t i) const { return data + i * row_stride; }

  // The same matrix without its first rows.
  Rows from(int64_t first) const {
    Rows rest = *this;
    rest.data += first * row_stride;
    rest.rows -= first;
    return rest;
  }
};

}  // namespace repdeg_fast
