// The random numbers themselves as operators, so that tests can hold them against the reference.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "noise.h"
#include "rows.h"

namespace repdeg_fast {
namespace {

// f(row of the block, its words) for the rows × columns words from (first_row, 4·first_quad) on.
template <typename F>
void each_row(const Tensor& seed, int64_t first_row, int64_t rows, int64_t first_quad, int64_t columns, int64_t stream,
              F&& f) {
  const uint64_t key = uint64_t(*static_cast<const int64_t*>(seed.data_ptr()));
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> words((columns + 15) / 16 * 16);
    for (int64_t i = begin; i < end; ++i) {
      fill_words(words.data(), key, uint32_t(first_row + i), uint32_t(stream), uint32_t(first_quad), columns);
      f(i, words.data());
    }
  });
}

Tensor philox_words(const Tensor& seed, int64_t first_row, int64_t rows, int64_t first_quad, int64_t columns,
                    int64_t stream) {
  Tensor out = torch::stable::new_empty(seed, {rows, columns});
  int64_t* data = static_cast<int64_t*>(out.data_ptr());
  each_row(seed, first_row, rows, first_quad, columns, stream, [&](int64_t row, const uint32_t* words) {
    for (int64_t i = 0; i < columns; ++i) data[row * columns + i] = words[i];
  });
  return out;
}

Tensor philox_gumbel(const Tensor& seed, int64_t first_row, int64_t rows, int64_t first_quad, int64_t columns,
                     int64_t stream) {
  Tensor out = torch::stable::new_empty(seed, {rows, columns}, ScalarType::Float);
  float* data = static_cast<float*>(out.data_ptr());
  each_row(seed, first_row, rows, first_quad, columns, stream, [&](int64_t row, const uint32_t* words) {
    for (int64_t i = 0; i < columns; i += Vector<float>::lanes) {
      const FloatVector noise = gumbel_noise<float>(words + i);
      std::memcpy(data + row * columns + i, &noise, std::min<int64_t>(sizeof noise, 4 * (columns - i)));
    }
  });
  return out;
}

}  // namespace
}  // namespace repdeg_fast

STABLE_TORCH_LIBRARY_IMPL(repdeg_fast_native, CPU, m) {
  m.impl("philox_words", TORCH_BOX(&repdeg_fast::philox_words));
  m.impl("philox_gumbel", TORCH_BOX(&repdeg_fast::philox_gumbel));
}
