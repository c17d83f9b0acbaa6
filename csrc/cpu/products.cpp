// Matrix products as operators: see gemm.h, and repdeg_fast/native/products.py for who chooses.
#include <torch/csrc/stable/library.h>

#include "gemm.h"

namespace repdeg_fast {
namespace {

bool use_products(bool in_pieces, bool by_onednn, bool batch_invariant) {
  products.in_pieces = in_pieces;
  products.batch_invariant = batch_invariant;
  products.by_onednn = by_onednn && has_onednn();
  return products.by_onednn == by_onednn;
}

void add_to_rows(const Tensor& out, const Tensor& bias) {
  dispatch_floating(out.scalar_type(), "product", [&](auto t) {
    using T = decltype(t);
    const Rows<T> rows(out);
    const T* addend = static_cast<const T*>(bias.data_ptr());
    const int64_t step = bias.stride(0);
    for (int64_t i = 0; i < rows.rows; ++i)
      for (int64_t j = 0; j < rows.columns; ++j) rows.row(i)[j] = T(rows.row(i)[j] + addend[j * step]);
  });
}

Tensor product(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  const bool plain_bias = !bias || (bias->stride(0) == 1 && bias->size(0) > 1);
  if (plain_bias && a.size(1) <= kOneDnnChain && takes_onednn(a, b)) return onednn_product(a, b, bias);
  Tensor out = empty({a.size(0), b.size(1)}, a.scalar_type());
  multiply(out, a, b);
  if (bias) add_to_rows(out, *bias);
  return out;
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) { m.impl("product", TORCH_BOX(&repdeg_fast::product)); }

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CompositeImplicitAutograd, m) {
  m.impl("use_products", TORCH_BOX(&repdeg_fast::use_products));
}
