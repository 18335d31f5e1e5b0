// Top-k routing of one token, shared by the CPU and the CUDA kernel: both select the same experts.
//
// A logit and its index make one integer that sorts as the router must choose: larger logits first, the lowest index
// first among equals, -0 equal to 0, NaN before everything (as a stable descending sort of torch has it). The next
// expert is the largest such key below the last one, so nothing is marked or stored while selecting.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define EVENTLENS_HOST_DEVICE __host__ __device__ inline
#else
#define EVENTLENS_HOST_DEVICE inline
#endif

namespace eventlens {

EVENTLENS_HOST_DEVICE uint64_t route_key(float logit, int64_t expert) {
  uint32_t bits = 0;
  const float positive_zero = logit + 0.0f;
  memcpy(&bits, &positive_zero, sizeof(bits));
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (logit != logit) bits = 0xffffffffu;
  return uint64_t(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(expert));
}

EVENTLENS_HOST_DEVICE int32_t expert_of(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

// Writes k weights and experts of a token with `count` logits, the best first. renormalise: softmax over the selected;
// otherwise softmax over all, of which the selected are kept.
EVENTLENS_HOST_DEVICE void route_token(const float* logits, int64_t count, int64_t k, bool renormalise, float* weights,
                                       int32_t* experts) {
  uint64_t last = ~uint64_t(0);
  for (int64_t slot = 0; slot < k; ++slot) {
    uint64_t best = 0;
    for (int64_t e = 0; e < count; ++e) {
      const uint64_t key = route_key(logits[e], e);
      if (key > best && (slot == 0 || key < last)) best = key;
    }
    experts[slot] = expert_of(best);
    last = best;
  }
  const float largest = logits[experts[0]];
  float total = 0;
  for (int64_t slot = 0; slot < k; ++slot) {
    weights[slot] = expf(logits[experts[slot]] - largest);
    total += weights[slot];
  }
  if (!renormalise) {
    total = 0;
    for (int64_t e = 0; e < count; ++e) total += expf(logits[e] - largest);
  }
  for (int64_t slot = 0; slot < k; ++slot) weights[slot] = weights[slot] / total;
}

}  // namespace eventlens
