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
  // Logits (R, W) of columns [first_column, first_column + W) to their gradient, in place. With `loss`: W is the whole
  // vocabulary, lse, loss and predicted are written. Without: lse is read. Row r has the target (first_row + r) mod
  // len(target). `scale`, `lse_scale`, `square_scale`: upstream gradients of the loss, of lse and of lse².
  m.def(
      "linear_cross_entropy_rows(Tensor(a!) logits, Tensor(b!) lse, Tensor(c!)? loss, Tensor(d!)? grad_bias,"
      " Tensor(e!)? predicted, Tensor target, Tensor? bias, Tensor? scale, Tensor? lse_scale, Tensor? square_scale,"
      " Tensor? class_weight, Tensor? class_total, int vocabulary, int first_row, int first_column, int ignore_index,"
      " float label_smoothing, float softcap, float gradient_filter, bool accumulate_bias) -> ()");
  m.def("linear_cross_entropy_count(Tensor target, int vocabulary, int ignore_index) -> int");  // -1 - i: i is wrong
  m.def("linear_cross_entropy_total(Tensor losses, int heads, Tensor share) -> Tensor");
  // The losses (K,), log-sum-exps and needed gradients of a problem in one chunk; the rest is empty.
  m.def(
      "linear_cross_entropy_small(Tensor hidden_states, Tensor weight, Tensor target, Tensor? bias, int heads,"
      " int ignore_index, float label_smoothing, float softcap, bool mean, bool needs_hidden_states, bool needs_weight,"
      " bool needs_bias) -> (Tensor loss, Tensor lse, Tensor grad_hidden_states, Tensor grad_weight, Tensor grad_bias)");
  m.def("linear_cross_entropy_multiply(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()");
  m.def("use_products(bool in_pieces, bool by_onednn, bool batch_invariant) -> bool");  // whether it can; see cpu/gemm.h
  m.def("product(Tensor a, Tensor b, Tensor? bias) -> Tensor");   // a @ b + bias
  m.def("linear_cross_entropy_advise(Tensor(a!) fresh) -> ()");  // contents unchanged: a hint about its pages
  m.def("linear_cross_entropy_add(Tensor(a!) total, Tensor product) -> ()");
  // Products of rows and columns to the gradient of their similarities, in place; without grad_loss they are left. Row
  // r's softmax is exp(logit - origin)/total; both are written, or read where softmax_known.
  m.def(
      "contrastive_rows(Tensor(a!) scores, Tensor(b!) origin, Tensor(c!) total, Tensor? row_scale, Tensor? column_scale,"
      " Tensor positive, Tensor? own, Tensor? threshold, Tensor? row_query_ids, Tensor? column_query_ids,"
      " Tensor? row_document_ids, Tensor? column_document_ids, Tensor? grad_loss, float multiplier, float slope,"
      " float positive_factor, float own_factor, int period, bool softmax_known, bool has_target) -> ()");
  // Cosines (R, W) of which the own column of row r is diagonal + r: Σ φ of each row, and φ' in place with `slopes`.
  // The numbers of kinds and of what is left out are those of repdeg_fast/contracts/pairwise.py.
  m.def(
      "pairwise_measure(Tensor(a!) cosines, Tensor(b!) sums, Tensor keep_rows, Tensor keep_columns, Tensor origin,"
      " int kind, float parameter, int diagonal, int left_out, bool slopes) -> ()");
  m.def(
      "pairwise_maxima(Tensor(a!) values, Tensor(b!) index, Tensor cosines, Tensor keep_columns, int diagonal,"
      " int left_out) -> ()");
  // Row r of cosines (R, W) is one point's with points [first, first + W): into its heap of the k largest so far.
  m.def("neighbours_look(Tensor(a!) values, Tensor(b!) index, Tensor cosines, int first) -> ()");
  m.def(
      "philox_words(Tensor seed, int first_row, int rows, int first_quad, int columns, int stream) -> Tensor");
  m.def(
      "philox_gumbel(Tensor seed, int first_row, int rows, int first_quad, int columns, int stream) -> Tensor");
  m.def(
      "gumbel_mix_forward(Tensor hidden_states, Tensor? mixture_logits, Tensor weight, Tensor? bias, Tensor embedding,"
      " Tensor seed, float temperature, int first_row, bool hard) -> (Tensor values, Tensor token_ids, Tensor peak)");
  // From logits (K, m, V) without the bias, of positions whose noise starts with that of first_row.
  m.def(
      "gumbel_mix_sample_logits(Tensor(a!) token_ids, Tensor(b!) peak, Tensor logits, Tensor? mixture_logits,"
      " Tensor? bias, Tensor seed, float temperature, int first_row) -> ()");
  m.def("gumbel_mix_embed(Tensor embedding, Tensor token_ids, Tensor peak) -> Tensor");
  m.def(
      "gumbel_mix_backward(Tensor grad_values, Tensor hidden_states, Tensor? mixture_logits, Tensor weight,"
      " Tensor? bias, Tensor embedding, Tensor token_ids, Tensor peak, Tensor seed, float temperature, int first_row,"
      " bool hard, float gradient_scale, bool wants_mixture, bool wants_embedding)"
      " -> (Tensor grad_mixture, Tensor grad_embedding)");
  m.def(
      "admin_norm_forward(Tensor x, Tensor branch, Tensor? omega, Tensor? weight, Tensor? bias, Tensor? branch_bias,"
      " Tensor? seed, float dropout, float eps, bool center) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "admin_norm_backward(Tensor grad_y, Tensor? y, Tensor? x, Tensor? branch, Tensor? omega, Tensor? weight,"
      " Tensor? bias, Tensor? branch_bias, Tensor? seed, Tensor? mean, Tensor rstd, float dropout, bool center,"
      " bool wants_branch, bool wants_omega, bool wants_weight, bool wants_bias, bool wants_branch_bias)"
      " -> (Tensor grad_x, Tensor grad_branch, Tensor grad_omega, Tensor grad_weight, Tensor grad_bias,"
      " Tensor grad_branch_bias)");
}
