// Matrix products by torch's library, and operands as it and the row kernels take them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>

#include "vector_math.h"

// x wᵀ + bias by oneDNN, of torch/csrc/inductor/aoti_torch/c/shim_cpu.h, which cannot be included here; a null pointer
// where PyTorch was built without oneDNN.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attribute, const double** scalars,
    int64_t number_of_scalars, const char** algorithm, AtenTensorHandle* product);

namespace repdeg_fast {

// Who multiplies, and in what pieces. Set by repdeg_fast/native/products.py, which has measured what is fastest here.
struct Products {
  std::atomic<bool> in_pieces{true};  // each thread multiplies pieces by itself
  std::atomic<bool> by_onednn{false};  // fp32 only; else by the BLAS library that PyTorch was built with
  std::atomic<bool> batch_invariant{false};  // no bit of a row depends on the other rows, or on their number
};
inline Products products;  // of this library

inline bool has_onednn() { return aoti_torch_cpu__linear_pointwise != nullptr; }

// out = a @ b, or out += a @ b, by the vendor's GEMM. Past the dispatcher: the threads of a pool know nothing of the
// caller's autograd and autocast.
inline void vendor_multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  TORCH_ERROR_CODE_CHECK(
      accumulate ? aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1)
                 : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

inline Tensor rows_of(Tensor t, int64_t first, int64_t count) { return torch::stable::narrow(t, 0, first, count); }

inline Tensor columns_of(Tensor t, int64_t first, int64_t count) { return torch::stable::narrow(t, 1, first, count); }

// f(first, count) for pieces of [0, length). Each thread takes the next piece when it is done with one: on a machine
// that others use too, halves of equal size do not end together.
template <typename F>
inline void parallel_pieces(int64_t length, int64_t size, F&& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first; (first = next.fetch_add(size)) < length;) f(first, std::min(size, length - first));
  });
}

// total += part, contiguous along their rows; `total` fp32 or double, `part` that or narrower.
inline void add(const Tensor& total, const Tensor& part) {
  dispatch_floating(part.scalar_type(), "add", [&](auto t) {
    using T = decltype(t);
    using A = typename Arithmetic<T>::type;
    constexpr int64_t L = Vector<A>::lanes;
    const Rows<A> sum(total);
    const Rows<T> rows(part);
    torch::stable::parallel_for(0, sum.rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        A* out = sum.row(r);
        const T* in = rows.row(r);
        int64_t i = 0;
        for (; i + L <= sum.columns; i += L) store(out + i, load(out + i) + load_values(in + i));
        for (; i < sum.columns; ++i) out[i] += static_cast<A>(in[i]);
      }
    });
  });
}

// oneDNN takes the second operand as it lies only if it is dense; a slice would go through its reference kernel, a
// thousand times slower.
inline bool is_dense(const Tensor& t) {
  return (t.stride(1) == 1 && t.stride(0) == t.size(1)) || (t.stride(0) == 1 && t.stride(1) == t.size(0));
}

constexpr int64_t kOneDnnFewest = int64_t(1) << 21;  // multiplications: a call costs about 25 µs more than BLAS's
constexpr int64_t kOneDnnChain = 1024;  // it adds up in one chain: the error grows with the length, longer ones are cut

// Whether a @ b is to be made by oneDNN.
inline bool takes_onednn(const Tensor& a, const Tensor& b) {
  const bool fp32 = a.scalar_type() == ScalarType::Float && b.scalar_type() == ScalarType::Float;
  const bool rows = a.stride(1) == 1 || a.stride(0) == 1;
  return products.by_onednn && fp32 && rows &&
         (products.batch_invariant || a.numel() * b.size(1) >= kOneDnnFewest);
}

inline bool takes_onednn(const Tensor& out, const Tensor& a, const Tensor& b) {
  return out.scalar_type() == ScalarType::Float && out.stride(1) == 1 && takes_onednn(a, b);
}

// The matrix, or its one row twice. oneDNN adds up each element of a product in one chain, whatever there is beside it,
// but has another kernel for vectors.
inline Tensor two_rows(const Tensor& t) {
  if (!products.batch_invariant || t.size(0) != 1) return t;
  const int64_t d = t.size(1);
  const Tensor twice = empty({2, d}, ScalarType::Float);
  const Rows<float> from(t), to(twice);
  for (int64_t j = 0; j < d; ++j) to.row(0)[j] = to.row(1)[j] = from.row(0)[j * from.column_stride];
  return twice;
}

// a @ b + bias by oneDNN; the bias contiguous, of more than one value.
inline Tensor onednn_product(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias = std::nullopt) {
  const Tensor x = two_rows(a), weight = two_rows(transposed(is_dense(b) ? b : torch::stable::contiguous(b)));
  AtenTensorHandle product = nullptr, addend = bias ? bias->get() : nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(x.get(), weight.get(), bias ? &addend : nullptr, "none",
                                                          nullptr, 0, nullptr, &product));
  const Tensor made(product);
  const bool whole = made.size(0) == a.size(0) && made.size(1) == b.size(1);
  return whole ? made : columns_of(rows_of(made, 0, a.size(0)), 0, b.size(1));
}

// out = a @ b, or out += a @ b, by oneDNN, which makes a product of its own.
inline void onednn_multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1), chains = (k + kOneDnnChain - 1) / kOneDnnChain;
  const Rows<float> rows(out);
  for (int64_t chain = 0; chain < chains; ++chain) {
    const int64_t first = k * chain / chains, count = k * (chain + 1) / chains - first;
    const Tensor product = onednn_product(columns_of(a, first, count), rows_of(b, first, count));
    const Rows<float> part(product);
    for (int64_t i = 0; i < m; ++i) {
      float *to = rows.row(i), *from = part.row(i);
      if (accumulate || chain > 0) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] += from[j];
      } else {
        std::memcpy(to, from, n * sizeof(float));
      }
    }
  }
}

inline void multiply_piece(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  takes_onednn(out, a, b) ? onednn_multiply(out, a, b, accumulate) : vendor_multiply(out, a, b, accumulate);
}

// out = a @ b, or out += a @ b, where one of the three dimensions is much longer than the others. A thread that
// multiplies pieces of that dimension by itself may be faster than threads that share the vendor's products, which pack
// the long operand once a thread. Where the long dimension is summed over, each thread has a sum of its own.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false) {
  constexpr int64_t kPiece = 1024;              // columns or rows
  constexpr int64_t kSums = int64_t(8) << 20;  // bytes, THREAD_SUMS in repdeg_fast/ops/chunked_logits.py
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1), threads = torch::stable::get_num_threads();
  const int64_t longest = std::max({m, k, n});
  const bool onednn = takes_onednn(out, a, b);  // whose products need pieces: they are made apart, and copied
  STD_TORCH_CHECK(onednn || !products.batch_invariant,
                  "batch-invariant products (REPDEG_FAST_PRODUCTS) are of float32 operands; convert them, or unset it");
  if (!onednn && (!products.in_pieces || threads == 1)) return vendor_multiply(out, a, b, accumulate);
  if (longest < threads * kPiece / 2) return multiply_piece(out, a, b, accumulate);
  const int64_t piece = std::min(kPiece, (longest / threads + 63) / 64 * 64);
  if (n == longest) {
    parallel_pieces(n, piece, [&](int64_t first, int64_t count) {
      multiply_piece(columns_of(out, first, count), a, columns_of(b, first, count), accumulate);
    });
  } else if (m == longest) {
    parallel_pieces(m, piece, [&](int64_t first, int64_t count) {
      multiply_piece(rows_of(out, first, count), rows_of(a, first, count), b, accumulate);
    });
  } else if (!products.batch_invariant && out.element_size() >= 4 &&  // 16 bits are no sum
             (threads - 1) * m * n * out.element_size() <= kSums) {
    const Tensor sums = torch::stable::new_empty(out, {(threads - 1) * m, n});
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = k * t / threads, count = k * (t + 1) / threads - first;
        multiply_piece(t ? rows_of(sums, (t - 1) * m, m) : out, columns_of(a, first, count), rows_of(b, first, count),
                       t == 0 && accumulate);
      }
    });
    for (int64_t t = 1; t < threads; ++t) add(out, rows_of(sums, (t - 1) * m, m));
  } else {
    multiply_piece(out, a, b, accumulate);
  }
}

// Whether a matrix can be read where it lies: of dtype `wide`, contiguous along its rows.
inline bool is_operand(const Tensor& t, ScalarType wide) { return t.scalar_type() == wide && t.stride(1) == 1; }

// The matrix itself where it can be read where it lies, else a copy, rounded to `narrow` on the way.
inline Tensor operand(const Tensor& t, ScalarType narrow, ScalarType wide) {
  if (is_operand(t, wide) && narrow == wide) return t;
  const Tensor rounded = t.scalar_type() == narrow ? t : torch::stable::to(t, narrow);
  return torch::stable::contiguous(torch::stable::to(rounded, wide));
}

}  // namespace repdeg_fast
