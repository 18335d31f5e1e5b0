// The CUDA kernels of expert routing, free of torch's libraries so that the tests can also run them thread by thread
// on a CPU (tests/ops/cuda_on_cpu.h). Launches are in moa_cuda.cu.
//
// The stable sort by expert is a counting sort in three launches: counts per tile of slots, running sums over experts
// and tiles, places. One thread serves one expert of a tile and walks the tile in order, which keeps the order within
// an expert without atomics, at a cost of TILE shared loads per thread.
#pragma once

#include "moa_route.h"

#include <cstdint>

namespace eventlens {

constexpr int TILE = 512;

// One thread per token.
__global__ void route_kernel(const float* logits, int64_t tokens, int64_t count, int64_t k, bool renormalise,
                             float* weights, int32_t* experts) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < tokens) route_token(logits + t * count, count, k, renormalise, weights + t * k, experts + t * k);
}

// Copies the slots of tile blockIdx.x to `tile` in shared memory; returns how many there are.
__device__ __forceinline__ int load_tile(const int32_t* experts, int64_t slots, int32_t* tile) {
  const int64_t first = int64_t(blockIdx.x) * TILE;
  const int size = static_cast<int>(slots - first < TILE ? slots - first : TILE);
  for (int s = threadIdx.x; s < size; s += blockDim.x) tile[s] = experts[first + s];
  __syncthreads();
  return size;
}

// counts[tile, expert]. Dynamic shared memory, here and in place_kernel: TILE words.
__global__ void count_kernel(const int32_t* experts, int64_t slots, int num_experts, int32_t* counts) {
  extern __shared__ __align__(16) unsigned char shared[];
  int32_t* tile = reinterpret_cast<int32_t*>(shared);
  const int size = load_tile(experts, slots, tile);
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    int32_t count = 0;
    for (int s = 0; s < size; ++s) count += tile[s] == e;
    counts[int64_t(blockIdx.x) * num_experts + e] = count;
  }
}

// Turns counts into the first place of each (tile, expert); offsets[E + 1]. One block.
__global__ void scan_kernel(int tiles, int num_experts, int32_t* counts, int32_t* offsets) {
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    int32_t total = 0;
#pragma unroll 8
    for (int t = 0; t < tiles; ++t) total += counts[int64_t(t) * num_experts + e];
    offsets[e + 1] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    offsets[0] = 0;
    for (int e = 0; e < num_experts; ++e) offsets[e + 1] += offsets[e];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    int32_t place = offsets[e];
    for (int t = 0; t < tiles; ++t) {
      int32_t* entry = counts + int64_t(t) * num_experts + e;
      const int32_t count = *entry;
      *entry = place;
      place += count;
    }
  }
}

__global__ void place_kernel(const int32_t* experts, int64_t slots, int num_experts, const int32_t* places,
                             int32_t* order) {
  extern __shared__ __align__(16) unsigned char shared[];
  int32_t* tile = reinterpret_cast<int32_t*>(shared);
  const int size = load_tile(experts, slots, tile);
  const int32_t first = static_cast<int32_t>(blockIdx.x) * TILE;
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    int32_t place = places[int64_t(blockIdx.x) * num_experts + e];
    for (int s = 0; s < size; ++s) {
      if (tile[s] == e) order[place++] = first + s;
    }
  }
}

// Copies rows of `units` Units: out[s] = x[order[s] / k]. One block per slot.
template <typename Unit>
__global__ void gather_kernel(const Unit* x, const int32_t* order, int64_t k, int64_t units, Unit* out) {
  const int64_t s = blockIdx.x;
  const Unit* from = x + order[s] / k * units;
  for (int64_t c = threadIdx.x; c < units; c += blockDim.x) out[s * units + c] = from[c];
}

__global__ void invert_kernel(const int32_t* order, int64_t slots, int32_t* row_of_slot) {
  const int64_t s = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (s < slots) row_of_slot[order[s]] = static_cast<int32_t>(s);
}

// out[t] = sum over j of weights[t, j] * y[row of slot t * k + j], in the order of j. One block per token.
template <typename T, typename A>
__global__ void combine_kernel(const T* y, const int32_t* row_of_slot, const float* weights, int64_t k,
                               int64_t channels, T* out) {
  const int64_t t = blockIdx.x;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    A sum = 0;
    for (int64_t s = t * k; s < (t + 1) * k; ++s) {
      sum += static_cast<A>(weights[s]) * static_cast<A>(y[int64_t(row_of_slot[s]) * channels + c]);
    }
    out[t * channels + c] = static_cast<T>(sum);
  }
}

}  // namespace eventlens
