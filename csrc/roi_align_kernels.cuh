// The CUDA kernels of RoI-align, free of torch's libraries so that the tests can also run them thread by thread on a
// CPU (tests/ops/cuda_on_cpu.h). Launches are in roi_align_cuda.cu.
//
// Every thread owns VEC neighbouring channels, so all branches on weights are the same for a whole block and a weight
// of zero costs no load. One block owns each output row: no atomics, no zero fill, sums in the order of the boxes.
// Blocks of one RoI, or of one image, are neighbours, which keeps what they share in L2. Offsets are 64 bits wide.
#pragma once

#include "roi_align_plan.h"

#include <cstdint>

namespace eventlens {

constexpr int MAX_LEVELS = 16;
constexpr int GROUP = 4;

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Packed {
  T value[VEC];
};

template <typename T>
struct LevelList {
  const T* cells[MAX_LEVELS];  // first cell of the first image
  int64_t image_stride[MAX_LEVELS];
  int64_t cell_stride[MAX_LEVELS];
  int count;
};

// The plan's tensors and the sizes of a call; A is the type that sums run in.
template <typename A>
struct PlanView {
  const A* wy;            // [R, P, H]
  const A* wx;            // [R, Q, W]
  const int32_t* window;  // [R, 4]
  const int64_t* offsets;
  int64_t images;
  int bins_y, bins_x, height, width;
};

template <typename A, typename T, int VEC>
__device__ __forceinline__ void add_weighted(A (&sum)[VEC], A weight, const Packed<T, VEC>& packed) {
#pragma unroll
  for (int v = 0; v < VEC; ++v) sum[v] += weight * static_cast<A>(packed.value[v]);
}

template <typename T, int VEC>
__device__ __forceinline__ Packed<T, VEC> load_packed(const T* from) {
  return *reinterpret_cast<const Packed<T, VEC>*>(from);
}

template <typename A, typename T, int VEC>
__device__ __forceinline__ void store_scaled(T* to, const A (&sum)[VEC], A scale) {
  Packed<T, VEC> packed;
#pragma unroll
  for (int v = 0; v < VEC; ++v) packed.value[v] = static_cast<T>(sum[v] * scale);
  *reinterpret_cast<Packed<T, VEC>*>(to) = packed;
}

// The image of a box: the last one that begins at or before it.
__device__ __forceinline__ int64_t image_of(const int64_t* offsets, int64_t images, int64_t box) {
  int64_t low = 0, high = images;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle] <= box) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Plan: one block per RoI, one thread per row of a table. Dynamic shared memory: one Range per row of both tables.
template <typename A>
__global__ void plan_kernel(const A* boxes, int64_t bins_y, int64_t bins_x, int height, int width, Sampling sampling,
                            bool mean, A* wy, A* wx, int32_t* window) {
  extern __shared__ __align__(16) unsigned char shared[];
  Range* ranges = reinterpret_cast<Range*>(shared);
  const int64_t r = blockIdx.x;
  const A* box = boxes + 4 * r;
  const int rows_y = mean ? 1 : static_cast<int>(bins_y), rows_x = mean ? 1 : static_cast<int>(bins_x);
  for (int row = threadIdx.x; row < rows_y + rows_x; row += blockDim.x) {
    const bool is_y = row < rows_y;
    const int64_t p = is_y ? row : row - rows_y;
    const int64_t bins = is_y ? bins_y : bins_x;
    const int cells = is_y ? height : width;
    A* to = is_y ? wy + (r * rows_y + p) * height : wx + (r * rows_x + p) * width;
    const Interval<A> along = interval(box[is_y ? 1 : 0], box[is_y ? 3 : 2], sampling);
    ranges[row] = axis_weights(along, bins, p, mean ? bins : p + 1, cells, sampling, to);
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    const int first = threadIdx.x == 0 ? 0 : rows_y, last = threadIdx.x == 0 ? rows_y : rows_y + rows_x;
    Range all = {INT32_MAX, 0};
    for (int row = first; row < last; ++row) {
      if (ranges[row].begin == ranges[row].end) continue;
      all.begin = ranges[row].begin < all.begin ? ranges[row].begin : all.begin;
      all.end = ranges[row].end > all.end ? ranges[row].end : all.end;
    }
    window[4 * r + 2 * threadIdx.x] = all.begin < all.end ? all.begin : 0;
    window[4 * r + 2 * threadIdx.x + 1] = all.begin < all.end ? all.end : 0;
  }
}

// Forward: a block owns all bins of one RoI for blockDim.x * VEC channels, BINS columns of bins at a time. A column of
// cells is first summed over the rows of a bin, then added to the bins that it weighs in.
// Grid: R * channel blocks. Dynamic shared memory: (P * H + W * BINS) weights.
template <typename T, typename A, int VEC, int BINS>
__global__ void __launch_bounds__(256) pool_kernel(LevelList<T> levels, PlanView<A> plan, int channels,
                                                   int channel_blocks, A scale, T* out) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int64_t r = blockIdx.x / channel_blocks;
  const int channel = (static_cast<int>(blockIdx.x % channel_blocks) * blockDim.x + threadIdx.x) * VEC;
  const int32_t* window = plan.window + 4 * r;
  const int top = window[0], left = window[2], rows = window[1] - top, columns = window[3] - left;
  const int64_t image = image_of(plan.offsets, plan.images, r);
  A* column_weights = reinterpret_cast<A*>(shared);       // [columns, BINS]
  A* row_weights = column_weights + plan.width * BINS;    // [P, rows]
  for (int k = threadIdx.x; k < plan.bins_y * rows; k += blockDim.x) {
    row_weights[k] = plan.wy[(r * plan.bins_y + k / rows) * plan.height + top + k % rows];
  }
  for (int first_bin = 0; first_bin < plan.bins_x; first_bin += BINS) {
    __syncthreads();
    for (int k = threadIdx.x; k < columns * BINS; k += blockDim.x) {
      const int q = first_bin + k % BINS;
      column_weights[k] = q < plan.bins_x ? plan.wx[(r * plan.bins_x + q) * plan.width + left + k / BINS] : A(0);
    }
    __syncthreads();
    if (channel >= channels) continue;
    for (int p = 0; p < plan.bins_y; ++p) {
      const A* weights = row_weights + p * rows;
      int first_row = 0, last_row = rows;
      while (first_row < last_row && weights[first_row] == A(0)) ++first_row;
      while (first_row < last_row && weights[last_row - 1] == A(0)) --last_row;
      A bins[BINS][VEC] = {};
      for (int j = 0; j < columns; ++j) {
        const A* shares = column_weights + j * BINS;
        bool used = false;
#pragma unroll
        for (int q = 0; q < BINS; ++q) used |= shares[q] != A(0);
        if (!used) continue;
        A sum[VEC] = {};
        for (int level = 0; level < levels.count; ++level) {
          const int64_t stride = levels.cell_stride[level];
          const T* cell = levels.cells[level] + image * levels.image_stride[level] +
                          (int64_t(top) * plan.width + left + j) * stride + channel;
#pragma unroll 4
          for (int i = first_row; i < last_row; ++i) {
            if (weights[i] != A(0)) add_weighted(sum, weights[i], load_packed<T, VEC>(cell + i * plan.width * stride));
          }
        }
#pragma unroll
        for (int q = 0; q < BINS; ++q) {
          if (shares[q] == A(0)) continue;
#pragma unroll
          for (int v = 0; v < VEC; ++v) bins[q][v] += shares[q] * sum[v];
        }
      }
#pragma unroll
      for (int q = 0; q < BINS; ++q) {
        if (first_bin + q >= plan.bins_x) continue;
        const int64_t bin = (r * plan.bins_y + p) * plan.bins_x + first_bin + q;
        store_scaled(out + bin * channels + channel, bins[q], scale);
      }
    }
  }
}

// Backward: a block owns CELLS neighbouring cells of one row of one image for blockDim.x * VEC channels and walks the
// image's RoIs in order. The bins of a column are first summed over the rows of bins, STEP columns at a time so that
// their loads are in flight together, then added to the cells that they weigh; `groups` says which.
// Grid: images * H * column tiles * channel blocks. Dynamic shared memory: Q * CELLS + P weights, Q words.
template <typename T, typename A, int VEC, int CELLS>
__global__ void __launch_bounds__(256) gradient_kernel(const T* grad, PlanView<A> plan, int prefix, int channels,
                                                       int channel_blocks, A scale, T* out) {
  constexpr int GROUPS = CELLS / GROUP, STEP = 4;
  static_assert(GROUPS == 4, "a word holds one byte per group");
  extern __shared__ __align__(16) unsigned char shared[];
  A* column_weights = reinterpret_cast<A*>(shared);                        // [Q, CELLS]
  A* row_weights = column_weights + plan.bins_x * CELLS;                   // [P]
  uint32_t* groups = reinterpret_cast<uint32_t*>(row_weights + plan.bins_y);  // [Q], a byte per group of cells
  const int tiles = (plan.width + CELLS - 1) / CELLS;
  int64_t index = blockIdx.x / channel_blocks;
  const int left = static_cast<int>(index % tiles) * CELLS;
  index /= tiles;
  const int i = static_cast<int>(index % plan.height);
  const int64_t image = index / plan.height;
  const int channel = (static_cast<int>(blockIdx.x % channel_blocks) * blockDim.x + threadIdx.x) * VEC;
  A cells[CELLS][VEC] = {};
  for (int64_t r = plan.offsets[image]; r < plan.offsets[image + 1]; ++r) {
    const int32_t* window = plan.window + 4 * r;
    if (i < window[0] || i >= window[1] || left >= window[3] || left + CELLS <= window[2]) continue;
    __syncthreads();
    for (int k = threadIdx.x; k < plan.bins_x * GROUPS; k += blockDim.x) {
      const A* from = plan.wx + (r * plan.bins_x + k / GROUPS) * plan.width;
      bool used = false;
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        const int j = left + k % GROUPS * GROUP + g;
        const A weight = j < plan.width ? from[j] : A(0);
        column_weights[k * GROUP + g] = weight;
        used |= weight != A(0);
      }
      reinterpret_cast<uint8_t*>(groups + k / GROUPS)[k % GROUPS] = used;
    }
    for (int p = threadIdx.x; p < plan.bins_y; p += blockDim.x) {
      row_weights[p] = plan.wy[(r * plan.bins_y + p) * plan.height + i];
    }
    __syncthreads();
    if (channel >= channels) continue;
    const T* bins = grad + r * plan.bins_y * plan.bins_x * channels + channel;
    for (int first = 0; first < plan.bins_x; first += STEP) {
      uint32_t used[STEP];
      A sum[STEP][VEC] = {};
      uint32_t any = 0;
#pragma unroll
      for (int s = 0; s < STEP; ++s) {
        used[s] = first + s < plan.bins_x ? groups[first + s] : 0;
        any |= used[s];
      }
      if (any == 0) continue;
      for (int p = 0; p < plan.bins_y; ++p) {
        const A weight = row_weights[p];
        if (weight == A(0)) continue;
        const T* bin = bins + (int64_t(p) * plan.bins_x + first) * channels;
#pragma unroll
        for (int s = 0; s < STEP; ++s) {
          if (used[s]) add_weighted(sum[s], weight, load_packed<T, VEC>(bin + int64_t(s) * channels));
        }
      }
#pragma unroll
      for (int s = 0; s < STEP; ++s) {
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
          if ((used[s] >> (8 * g) & 0xff) == 0) continue;
#pragma unroll
          for (int k = 0; k < GROUP; ++k) {
            const A weight = column_weights[(first + s) * CELLS + g * GROUP + k];
            if (weight == A(0)) continue;
#pragma unroll
            for (int v = 0; v < VEC; ++v) cells[g * GROUP + k][v] += weight * sum[s][v];
          }
        }
      }
    }
  }
  if (channel >= channels) return;
  T* first = out + image * (prefix + int64_t(plan.height) * plan.width) * channels + channel;
  const A zero[VEC] = {};
  if (i == 0 && left == 0) {
    for (int n = 0; n < prefix; ++n) store_scaled(first + int64_t(n) * channels, zero, scale);
  }
  T* row = first + (prefix + int64_t(i) * plan.width + left) * channels;
#pragma unroll
  for (int j = 0; j < CELLS; ++j) {
    if (left + j < plan.width) store_scaled(row + int64_t(j) * channels, cells[j], scale);
  }
}

}  // namespace eventlens
