// out[c] = scale * sum_k weight_k * row_k[c]: the one inner loop of every CPU kernel in this folder.
//
// RoI-align forward and backward and the combination of experts are sparse matrices times dense rows of channels;
// they differ only in how the terms of a row are listed. Sums run in the order of the terms, in float (double for
// double rows), with one rounding at the end, multiplication and addition rounded separately: the same bits on every
// x86 machine, whichever vector instructions it has.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace eventlens {

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

template <typename T>
struct Term {
  const T* row;
  Accumulator<T> weight;
};

// `out` must not overlap a row. No term gives zeros.
void weighted_sum(float* out, const Term<float>* terms, int64_t count, int64_t channels, float scale);
void weighted_sum(double* out, const Term<double>* terms, int64_t count, int64_t channels, double scale);
void weighted_sum(torch::headeronly::BFloat16* out, const Term<torch::headeronly::BFloat16>* terms, int64_t count,
                  int64_t channels, float scale);
void weighted_sum(torch::headeronly::Half* out, const Term<torch::headeronly::Half>* terms, int64_t count,
                  int64_t channels, float scale);

}  // namespace eventlens
