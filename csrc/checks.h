// What the operators' files share: torch by its stable ABI, threads, and checks of arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>

namespace kloss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Runs jobs on all threads. A free thread takes the next job: adapters may have very different numbers of rows.
inline void parallel(int64_t jobs, void (*job)(int64_t, const void*), const void* context) {
  std::atomic<int64_t> next{0};
  int64_t threads = std::min<int64_t>(jobs, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < jobs; i = next++) job(i, context);
  });
}

// Runs f(i) for i in 0..jobs-1 on all threads.
template <class F>
void each(int64_t jobs, const F& f) {
  parallel(jobs, [](int64_t i, const void* context) { (*(const F*)context)(i); }, &f);
}

// Checks a contiguous tensor of `dims` dimensions.
inline void check(const Tensor& tensor, ScalarType type, int64_t dims, const char* name) {
  bool fits = tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type && tensor.dim() == dims;
  STD_TORCH_CHECK(fits, name, " has another type, device or layout");
}

// A contiguous tensor of a shape, to read or to write.
template <class T = void>
T* data(const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> shape, const char* name) {
  check(tensor, type, (int64_t)shape.size(), name);
  bool fits = std::equal(shape.begin(), shape.end(), tensor.sizes().begin());
  STD_TORCH_CHECK(fits, name, " has another shape");
  return (T*)tensor.const_data_ptr();
}

inline const void* pointer(const std::optional<Tensor>& tensor, ScalarType type, int64_t dims, const char* name) {
  if (!tensor) return nullptr;
  check(*tensor, type, dims, name);
  return tensor->const_data_ptr();
}

// Checks that every value lies in low..high. Values index memory, so they are not trusted; a sign bit of `outside` shows a fault.
inline void check_range(const int64_t* values, int64_t count, int64_t low, int64_t high, const char* name) {
  uint64_t outside = 0;
  for (int64_t i = 0; i < count; ++i)
    outside |= ((uint64_t)values[i] - (uint64_t)low) | ((uint64_t)high - (uint64_t)values[i]);
  STD_TORCH_CHECK(!(outside >> 63), name, " has a value outside ", low, "..", high);
}

// Checks that offsets start at 0, do not decrease and end within `rows`.
inline const int32_t* offsets(const Tensor& cu_seqlens, int64_t rows) {
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, "cu_seqlens must be [S+1]");
  const int32_t* cu = data<int32_t>(cu_seqlens, ScalarType::Int, {cu_seqlens.size(0)}, "cu_seqlens");
  int64_t sequences = cu_seqlens.size(0) - 1;
  bool fits = cu[0] == 0 && cu[sequences] <= rows;
  for (int64_t s = 0; s < sequences; ++s) fits &= cu[s] <= cu[s + 1];
  STD_TORCH_CHECK(fits, "cu_seqlens must start at 0, not decrease, and end within the ", rows, " rows there are");
  return cu;
}

}  // namespace kloss
