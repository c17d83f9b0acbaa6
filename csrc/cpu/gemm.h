// Matrix products by torch's library, and operands as it and the row kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

#include "rows.h"

namespace repdeg_fast {

// out = a @ b. `out` may be a strided view.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the returned reference to `out` is released
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

inline Tensor rows_of(Tensor t, int64_t first, int64_t count) { return torch::stable::narrow(t, 0, first, count); }

// Whether a matrix can be read where it lies: of dtype `wide`, contiguous along its rows.
inline bool is_operand(const Tensor& t, ScalarType wide) { return t.scalar_type() == wide && t.stride(1) == 1; }

// The matrix itself where it can be read where it lies, else a copy, rounded to `narrow` on the way.
inline Tensor operand(const Tensor& t, ScalarType narrow, ScalarType wide) {
  if (is_operand(t, wide) && narrow == wide) return t;
  const Tensor rounded = t.scalar_type() == narrow ? t : torch::stable::to(t, narrow);
  return torch::stable::contiguous(torch::stable::to(rounded, wide));
}

}  // namespace repdeg_fast
