// What the op wrappers of every file share: dtype names, argument checks with both numbers, one loop over tasks.
//
// Everything here is on the LibTorch stable ABI (torch/csrc/stable, torch/headeronly), so one library serves every
// torch from 2.10 on. The Python front doors check first and say it more kindly; these checks are what stands between
// a wrong call of a primitive and memory that is not ours.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <tuple>
#include <vector>

namespace eventlens {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls body<T>() with the C++ type of a floating-point dtype.
template <typename Body>
void with_float_type(ScalarType dtype, const char* what, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Half{});
    default:
      STD_TORCH_CHECK(false, what, " must be float32, float64, bfloat16 or float16, got ScalarType ",
                      static_cast<int>(dtype));
  }
}

// The same for the tables and boxes of RoI-align, which are float32 or float64.
template <typename Body>
void with_table_type(ScalarType dtype, const char* what, const Body& body) {
  if (dtype == ScalarType::Float) return body(float{});
  if (dtype == ScalarType::Double) return body(double{});
  STD_TORCH_CHECK(false, what, " must be float32 or float64, got ScalarType ", static_cast<int>(dtype));
}

inline void check_layout(const Tensor& tensor, const char* name, int64_t dims, bool cuda) {
  STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_cuda() == cuda, name, " must be on the ", cuda ? "GPU" : "CPU", " like the others");
}

inline void check_dense(const Tensor& tensor, const char* name, int64_t dims, ScalarType dtype, bool cuda) {
  check_layout(tensor, name, dims, cuda);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must have ScalarType ", static_cast<int>(dtype), ", got ",
                  static_cast<int>(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_size(const Tensor& tensor, const char* name, int64_t dim, int64_t expected) {
  STD_TORCH_CHECK(tensor.size(dim) == expected, name, " has ", tensor.size(dim), " in dimension ", dim, ", expected ",
                  expected);
}

// Runs run(task, scratch) for every task on torch's own threads; `scratch` is one default-made Scratch per thread.
// Threads take the next tasks as they finish, which evens out images with many boxes. A task owns what it writes, so
// results do not depend on which thread took it. `cost` is about how many numbers a task reads: a thread is woken only
// for WORTH_A_THREAD of them, since waking it can take longer than a small call.
constexpr int64_t WORTH_A_THREAD = 1 << 16;

template <typename Scratch, typename Run>
void for_each_task(int64_t tasks, int64_t cost, const Run& run) {
  if (tasks <= 0) return;
  const int64_t useful = std::max<int64_t>(1, tasks * cost / WORTH_A_THREAD);
  const int64_t workers = std::min<int64_t>({torch::stable::get_num_threads(), tasks, useful});
  const int64_t chunk = std::max<int64_t>(1, tasks / (workers * 16));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    Scratch scratch;
    for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < tasks;) {
      for (int64_t task = begin; task < std::min(begin + chunk, tasks); ++task) run(task, scratch);
    }
  });
}

}  // namespace eventlens
