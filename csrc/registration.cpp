// Every native operator, in one place: C++ kernels are registered for CPU in cpu/<op>.cpp, CUDA ones in cuda/<op>.cu.
// The Python operators (repdeg_fast/ops/<op>.py) add fake functions and autograd; these are the bare kernels.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(repdeg_fast_native, m) {
  m.def(
      "cosreg_forward(Tensor weight, Tensor? row_weight, float eps)"
      " -> (Tensor value, Tensor column_sum, Tensor inverse_norm, Tensor total_weight)");
  m.def(
      "cosreg_backward(Tensor(a!) grad_weight, Tensor grad_value, Tensor weight, Tensor? row_weight,"
      " Tensor column_sum, Tensor inverse_norm, Tensor? total_weight, float eps, bool accumulate) -> ()");
  m.def(
      "philox_words(Tensor seed, int first_row, int rows, int first_quad, int columns, int stream) -> Tensor");
  m.def(
      "philox_gumbel(Tensor seed, int first_row, int rows, int first_quad, int columns, int stream) -> Tensor");
  m.def(
      "gumbel_mix_sample(Tensor(a!) token_ids, Tensor(b!) lse, Tensor mixed, Tensor weight, Tensor? bias, Tensor seed,"
      " float temperature) -> ()");
  m.def(
      "gumbel_mix_soft_value(Tensor(a!) value, Tensor mixed, Tensor weight, Tensor? bias, Tensor embedding, Tensor lse,"
      " Tensor seed, float temperature) -> ()");
  m.def(
      "gumbel_mix_backward(Tensor(a!)? grad_mixed, Tensor(b!)? grad_embedding, Tensor grad_embeddings, Tensor origin,"
      " Tensor mixed, Tensor weight, Tensor? bias, Tensor embedding, Tensor lse, Tensor seed, float temperature)"
      " -> ()");
}
