// The arithmetic of RoI-align: weights of the cells along one axis. Used unchanged by the CPU and the CUDA plan.
//
// In: an interval of a box along one axis, in cells. Out: the share of each cell in a bin, and the range of cells with
// a share. Semantics of torchvision.ops.roi_align (He et al., Mask R-CNN, 2017): samples in [-1, cells], both ends
// included, are clamped to the border and shared between two cells; others count as zero.
// The order of operations is that of eventlens_ds/ops/roi_align/reference.py and no product is fused with a sum:
// ceil(bin) of adaptive sampling and the edges at -1 and `cells` are knife edges that one rounding can cross.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define EVENTLENS_HOST_DEVICE __host__ __device__ inline
#else
#define EVENTLENS_HOST_DEVICE inline
#endif

namespace eventlens {

// On the device the intrinsics forbid contraction; on the host the flag -ffp-contract=off does.
#ifdef __CUDA_ARCH__
EVENTLENS_HOST_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
EVENTLENS_HOST_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }
EVENTLENS_HOST_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
EVENTLENS_HOST_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
#else
EVENTLENS_HOST_DEVICE float multiply(float a, float b) { return a * b; }
EVENTLENS_HOST_DEVICE double multiply(double a, double b) { return a * b; }
EVENTLENS_HOST_DEVICE float add(float a, float b) { return a + b; }
EVENTLENS_HOST_DEVICE double add(double a, double b) { return a + b; }
#endif

// How all boxes of a call are sampled.
struct Sampling {
  double spatial_scale;
  int64_t ratio;  // samples per bin and axis; <= 0: as many as the bin has cells, rounded up
  bool aligned;
};

// Half-open range of cells.
struct Range {
  int32_t begin;
  int32_t end;
};

template <typename T>
struct Interval {
  T start;
  T length;
};

// The interval [low, high] of a box, in its own units, as cells.
template <typename T>
EVENTLENS_HOST_DEVICE Interval<T> interval(T low, T high, const Sampling& sampling) {
  const T scale = static_cast<T>(sampling.spatial_scale);
  const T shift = sampling.aligned ? T(-0.5) : T(0);
  const T start = add(multiply(low, scale), shift);
  T length = add(add(multiply(high, scale), shift), -start);
  if (!sampling.aligned && length < T(1)) length = T(1);
  return {start, length};
}

// Adds one sample to `row` and widens `range` by the cells that it touches.
template <typename T>
EVENTLENS_HOST_DEVICE void add_sample(T sample, int32_t cells, T* row, Range& range) {
  if (!(sample >= T(-1) && sample <= T(cells))) return;
  const T last = T(cells - 1);
  const T at = sample < T(0) ? T(0) : (sample > last ? last : sample);
  const int32_t low = static_cast<int32_t>(at);
  for (int32_t cell = low; cell < low + 2 && cell < cells; ++cell) {
    const T distance = add(at, -T(cell));
    const T share = add(T(1), -(distance < T(0) ? -distance : distance));
    if (!(share > T(0))) continue;
    row[cell] = add(row[cell], share);
    range.begin = range.begin < cell ? range.begin : cell;
    range.end = range.end > cell + 1 ? range.end : cell + 1;
  }
}

// Writes the mean weights of bins [first_bin, last_bin) of `bins` to row[cells]; returns the cells with a weight, or
// {0, 0}. One bin is an ordinary row of the table; all bins are the row of mean pooling, which has rank one.
template <typename T>
EVENTLENS_HOST_DEVICE Range axis_weights(const Interval<T>& box, int64_t bins, int64_t first_bin, int64_t last_bin,
                                         int32_t cells, const Sampling& sampling, T* row) {
  for (int32_t cell = 0; cell < cells; ++cell) row[cell] = T(0);
  const T bin = box.length / T(bins);
  const T samples = sampling.ratio > 0 ? T(sampling.ratio) : std::ceil(bin);
  if (!(samples > T(0)) || std::isinf(samples)) return {0, 0};
  Range range{cells, 0};
  for (int64_t p = first_bin; p < last_bin; ++p) {
    const T first = add(box.start, multiply(T(p), bin));
    T lowest = T(0);
    int64_t count = sampling.ratio;
    if (sampling.ratio <= 0) {
      // Adaptive samples are more than half a cell apart, so only so many of a huge box can fall on the grid.
      count = 2 * (int64_t(cells) + 1) + 4;
      lowest = std::floor((T(-1) - first) / (bin / samples) - T(0.5)) - T(1);
      if (!(lowest > T(0)) || std::isinf(lowest)) lowest = T(0);
    }
    for (int64_t k = 0; k < count; ++k) {
      const T index = add(lowest, T(k));
      if (!(index < samples)) break;
      add_sample(add(first, multiply(add(index, T(0.5)), bin) / samples), cells, row, range);
    }
  }
  if (range.begin >= range.end) return {0, 0};
  for (int32_t cell = range.begin; cell < range.end; ++cell) {
    row[cell] = row[cell] / samples;
    if (last_bin - first_bin > 1) row[cell] = row[cell] / T(last_bin - first_bin);
  }
  return range;
}

}  // namespace eventlens
