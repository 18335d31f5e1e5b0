// Routing of the mixture of adapters on a GPU; see moa_cpu.cpp for the contract and moa_kernels.cuh for the kernels.
#include "cuda_launch.h"
#include "moa_kernels.cuh"
#include "weighted_sum.h"

namespace eventlens {
namespace {

constexpr int THREADS = 256;

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t k, bool renormalise) {
  check_dense(logits, "logits", 2, ScalarType::Float, true);
  const int64_t tokens = logits.size(0), count = logits.size(1);
  STD_TORCH_CHECK(1 <= k && k <= count, "top-k routing needs 1 <= k <= ", count, " experts, got k=", k);
  Tensor weights = torch::stable::new_empty(logits, {tokens, k});
  Tensor experts = torch::stable::new_empty(logits, {tokens, k}, ScalarType::Int);
  if (tokens == 0) return {weights, experts};
  const Launch launch(logits);
  route_kernel<<<blocks((tokens + THREADS - 1) / THREADS), THREADS, 0, launch.stream()>>>(
      logits.const_data_ptr<float>(), tokens, count, k, renormalise, weights.mutable_data_ptr<float>(),
      experts.mutable_data_ptr<int32_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {weights, experts};
}

std::tuple<Tensor, Tensor> sort_by_expert(const Tensor& experts, int64_t num_experts) {
  check_dense(experts, "experts", 2, ScalarType::Int, true);
  STD_TORCH_CHECK(num_experts >= 1, "at least one expert is needed, got ", num_experts);
  const int64_t slots = experts.numel();
  STD_TORCH_CHECK(slots <= INT32_MAX, slots, " slots are more than int32 can number");
  const int64_t tiles = (slots + TILE - 1) / TILE;
  Tensor order = torch::stable::new_empty(experts, {slots});
  Tensor offsets = torch::stable::new_empty(experts, {num_experts + 1});
  Tensor counts = torch::stable::new_empty(experts, {tiles, num_experts});
  const int32_t* from = experts.const_data_ptr<int32_t>();
  int32_t* places = counts.mutable_data_ptr<int32_t>();
  const int number = static_cast<int>(num_experts);
  const size_t bytes = TILE * sizeof(int32_t);
  const Launch launch(experts);
  if (tiles > 0) count_kernel<<<blocks(tiles), THREADS, bytes, launch.stream()>>>(from, slots, number, places);
  scan_kernel<<<1, THREADS, 0, launch.stream()>>>(static_cast<int>(tiles), number, places,
                                                  offsets.mutable_data_ptr<int32_t>());
  if (tiles > 0) {
    place_kernel<<<blocks(tiles), THREADS, bytes, launch.stream()>>>(from, slots, number, places,
                                                                     order.mutable_data_ptr<int32_t>());
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {order, offsets};
}

template <typename Unit>
void launch_gather(const Launch& launch, const void* x, const Tensor& order, int64_t k, int64_t units, void* out) {
  gather_kernel<Unit><<<blocks(order.size(0)), THREADS, 0, launch.stream()>>>(
      static_cast<const Unit*>(x), order.const_data_ptr<int32_t>(), k, units, static_cast<Unit*>(out));
}

Tensor gather(const Tensor& x, const Tensor& order, int64_t k) {
  check_layout(x, "x", 2, true);
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  check_dense(order, "order", 1, ScalarType::Int, true);
  check_size(order, "order", 0, x.size(0) * k);
  Tensor out = torch::stable::new_empty(x, {order.size(0), x.size(1)});
  if (out.numel() == 0) return out;
  const Launch launch(x);
  const int64_t bytes = x.size(1) * x.element_size();
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const bool wide = bytes % sizeof(uint4) == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(uint4) == 0;
  if (wide) {
    launch_gather<uint4>(launch, from, order, k, bytes / sizeof(uint4), to);
  } else if (bytes % 2 == 0) {
    launch_gather<uint16_t>(launch, from, order, k, bytes / 2, to);
  } else {
    launch_gather<uint8_t>(launch, from, order, k, bytes, to);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor combine(const Tensor& y, const Tensor& order, const Tensor& weights) {
  check_layout(y, "y", 2, true);
  STD_TORCH_CHECK(y.is_contiguous(), "y must be contiguous");
  check_dense(order, "order", 1, ScalarType::Int, true);
  check_dense(weights, "weights", 2, ScalarType::Float, true);
  const int64_t tokens = weights.size(0), k = weights.size(1), slots = tokens * k, channels = y.size(1);
  check_size(y, "y", 0, slots);
  check_size(order, "order", 0, slots);
  Tensor out = torch::stable::new_empty(y, {tokens, channels});
  if (out.numel() == 0) return out;
  Tensor inverse = torch::stable::new_empty(order, {slots});
  int32_t* row_of_slot = inverse.mutable_data_ptr<int32_t>();
  const Launch launch(y);
  invert_kernel<<<blocks((slots + THREADS - 1) / THREADS), THREADS, 0, launch.stream()>>>(
      order.const_data_ptr<int32_t>(), slots, row_of_slot);
  with_float_type(y.scalar_type(), "y", [&](auto zero) {
    using T = decltype(zero);
    combine_kernel<T, Accumulator<T>><<<blocks(tokens), THREADS, 0, launch.stream()>>>(
        y.const_data_ptr<T>(), row_of_slot, weights.const_data_ptr<float>(), k, channels, out.mutable_data_ptr<T>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eventlens_csrc, CUDA, m) {
  m.impl("moa_route", TORCH_BOX(&route));
  m.impl("moa_sort_by_expert", TORCH_BOX(&sort_by_expert));
  m.impl("moa_gather", TORCH_BOX(&gather));
  m.impl("moa_combine", TORCH_BOX(&combine));
}

}  // namespace eventlens
