// Routing of the mixture of adapters on the CPU: top-k, stable sort by expert, gather, combine.
//
// Tokens with k experts each make T * k slots, slot t * k + j for choice j of token t. `order` lists the slots by
// expert, in their own order within one expert; `offsets` says where each expert begins. The matrix products of the
// experts run on gathered rows, elsewhere.
#include "checks.h"
#include "moa_route.h"
#include "weighted_sum.h"

#include <cstring>

namespace eventlens {
namespace {

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t k, bool renormalise) {
  check_dense(logits, "logits", 2, ScalarType::Float, false);
  const int64_t tokens = logits.size(0), count = logits.size(1);
  STD_TORCH_CHECK(1 <= k && k <= count, "top-k routing needs 1 <= k <= ", count, " experts, got k=", k);
  Tensor weights = torch::stable::new_empty(logits, {tokens, k});
  Tensor experts = torch::stable::new_empty(logits, {tokens, k}, ScalarType::Int);
  const float* from = logits.const_data_ptr<float>();
  float* to_weights = weights.mutable_data_ptr<float>();
  int32_t* to_experts = experts.mutable_data_ptr<int32_t>();
  for_each_task<char>(tokens, count * k, [&](int64_t t, char&) {
    route_token(from + t * count, count, k, renormalise, to_weights + t * k, to_experts + t * k);
  });
  return {weights, experts};
}

// A counting sort on one thread: slots are few (tokens times k) next to the rows that they stand for.
std::tuple<Tensor, Tensor> sort_by_expert(const Tensor& experts, int64_t num_experts) {
  check_dense(experts, "experts", 2, ScalarType::Int, false);
  STD_TORCH_CHECK(num_experts >= 1, "at least one expert is needed, got ", num_experts);
  const int64_t slots = experts.numel();
  STD_TORCH_CHECK(slots <= INT32_MAX, slots, " slots are more than int32 can number");
  Tensor order = torch::stable::new_empty(experts, {slots});
  Tensor offsets = torch::stable::new_empty(experts, {num_experts + 1});
  const int32_t* from = experts.const_data_ptr<int32_t>();
  std::vector<int32_t> next(num_experts + 1, 0);
  for (int64_t s = 0; s < slots; ++s) {
    STD_TORCH_CHECK(0 <= from[s] && from[s] < num_experts, "expert ", from[s], " of slot ", s, " is outside [0, ",
                    num_experts, ")");
    ++next[from[s] + 1];
  }
  for (int64_t e = 0; e < num_experts; ++e) next[e + 1] += next[e];
  std::copy(next.begin(), next.end(), offsets.mutable_data_ptr<int32_t>());
  int32_t* to = order.mutable_data_ptr<int32_t>();
  for (int64_t s = 0; s < slots; ++s) to[next[from[s]]++] = static_cast<int32_t>(s);
  return {order, offsets};
}

void check_order(const int32_t* order, int64_t slots) {
  for (int64_t s = 0; s < slots; ++s) {
    STD_TORCH_CHECK(0 <= order[s] && order[s] < slots, "order names slot ", order[s], " of ", slots);
  }
}

Tensor gather(const Tensor& x, const Tensor& order, int64_t k) {
  check_layout(x, "x", 2, false);
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  check_dense(order, "order", 1, ScalarType::Int, false);
  check_size(order, "order", 0, x.size(0) * k);
  const int64_t slots = order.size(0);
  const size_t bytes = x.size(1) * x.element_size();
  Tensor out = torch::stable::new_empty(x, {slots, x.size(1)});
  const int32_t* slot = order.const_data_ptr<int32_t>();
  check_order(slot, slots);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for_each_task<char>(slots, x.size(1), [&](int64_t s, char&) {
    std::memcpy(to + s * bytes, from + slot[s] / k * bytes, bytes);
  });
  return out;
}

Tensor combine(const Tensor& y, const Tensor& order, const Tensor& weights) {
  check_layout(y, "y", 2, false);
  STD_TORCH_CHECK(y.is_contiguous(), "y must be contiguous");
  check_dense(order, "order", 1, ScalarType::Int, false);
  check_dense(weights, "weights", 2, ScalarType::Float, false);
  const int64_t tokens = weights.size(0), k = weights.size(1), slots = tokens * k, channels = y.size(1);
  check_size(y, "y", 0, slots);
  check_size(order, "order", 0, slots);
  const int32_t* slot = order.const_data_ptr<int32_t>();
  check_order(slot, slots);
  std::vector<int32_t> row_of_slot(slots);
  for (int64_t s = 0; s < slots; ++s) row_of_slot[slot[s]] = static_cast<int32_t>(s);
  Tensor out = torch::stable::new_empty(y, {tokens, channels});
  const float* weight = weights.const_data_ptr<float>();
  with_float_type(y.scalar_type(), "y", [&](auto zero) {
    using T = decltype(zero);
    const T* from = y.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for_each_task<std::vector<Term<T>>>(tokens, k * channels, [&](int64_t t, std::vector<Term<T>>& terms) {
      terms.clear();
      for (int64_t s = t * k; s < (t + 1) * k; ++s) {
        terms.push_back({from + row_of_slot[s] * channels, static_cast<Accumulator<T>>(weight[s])});
      }
      weighted_sum(to + t * channels, terms.data(), k, channels, Accumulator<T>(1));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eventlens_csrc, CPU, m) {
  m.impl("moa_route", TORCH_BOX(&route));
  m.impl("moa_sort_by_expert", TORCH_BOX(&sort_by_expert));
  m.impl("moa_gather", TORCH_BOX(&gather));
  m.impl("moa_combine", TORCH_BOX(&combine));
}

}  // namespace eventlens
