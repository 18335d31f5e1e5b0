// The inner loop of the CPU kernels, compiled for SSE2, AVX2 and AVX-512; the machine's own is taken at run time.
//
// Written with the compilers' vector types, so that vectorisation does not depend on what an optimiser makes of a
// loop: a block of channels stays in registers while the terms stream by, and each output is stored once. Every width
// does the same operations on a channel in the same order, without fused multiply-add, so all give the same bits.
#include "weighted_sum.h"

#include <cstring>
#include <type_traits>

#define EVENTLENS_INLINE inline __attribute__((always_inline))

namespace eventlens {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// A vector of LANES numbers. A member of a template of its own: the attribute would be lost in a template argument.
template <int LANES, typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(LANES * sizeof(A))));
};
template <int LANES, typename A>
using Vector = typename VectorOf<LANES, A>::type;

template <int LANES, typename T>
EVENTLENS_INLINE void load(Vector<LANES, Accumulator<T>>& to, const T* from) {
  using Words = Vector<LANES, uint32_t>;
  Vector<LANES, uint16_t> half;
  if constexpr (std::is_same_v<T, BFloat16>) {
    std::memcpy(&half, from, sizeof(half));
    const Words words = __builtin_convertvector(half, Words) << 16;
    std::memcpy(&to, &words, sizeof(to));
  } else if constexpr (std::is_same_v<T, Half>) {
    // Exponent and mantissa move to their places in a float; 2^112 corrects the bias, also of subnormal numbers.
    std::memcpy(&half, from, sizeof(half));
    Words words = __builtin_convertvector(half, Words);
    const Words sign = (words & 0x8000u) << 16;
    const Words special = words & 0x7c00u;
    words = (words & 0x7fffu) << 13;
    std::memcpy(&to, &words, sizeof(to));
    to *= 0x1p112f;
    std::memcpy(&words, &to, sizeof(to));
    words |= sign | ((special == 0x7c00u) & 0x7f800000u);
    std::memcpy(&to, &words, sizeof(to));
  } else {
    std::memcpy(&to, from, sizeof(to));
  }
}

template <int LANES, typename T>
EVENTLENS_INLINE void store(T* to, const Vector<LANES, Accumulator<T>>& from) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    std::memcpy(to, &from, sizeof(from));
  } else {
    float values[LANES];
    std::memcpy(values, &from, sizeof(values));
    for (int lane = 0; lane < LANES; ++lane) to[lane] = static_cast<T>(values[lane]);
  }
}

// GROUPS vectors of channels.
template <int LANES, int GROUPS, typename T>
EVENTLENS_INLINE void block(T* out, const Term<T>* terms, int64_t count, int64_t channel, Accumulator<T> scale) {
  using Sum = Vector<LANES, Accumulator<T>>;
  Sum sum[GROUPS] = {};
  for (int64_t k = 0; k < count; ++k) {
    const T* row = terms[k].row + channel;
    const Accumulator<T> weight = terms[k].weight;
    for (int g = 0; g < GROUPS; ++g) {
      Sum values;
      load<LANES, T>(values, row + g * LANES);
      sum[g] += values * weight;
    }
  }
  for (int g = 0; g < GROUPS; ++g) store<LANES, T>(out + channel + g * LANES, Sum(sum[g] * scale));
}

template <int BYTES, typename T>
EVENTLENS_INLINE void whole(T* out, const Term<T>* terms, int64_t count, int64_t channels, Accumulator<T> scale) {
  constexpr int LANES = BYTES / sizeof(Accumulator<T>);
  constexpr int GROUPS = 4;
  int64_t c = 0;
  for (; c + GROUPS * LANES <= channels; c += GROUPS * LANES) block<LANES, GROUPS, T>(out, terms, count, c, scale);
  for (; c + LANES <= channels; c += LANES) block<LANES, 1, T>(out, terms, count, c, scale);
  for (; c < channels; ++c) {
    Accumulator<T> sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += static_cast<Accumulator<T>>(terms[k].row[c]) * terms[k].weight;
    out[c] = static_cast<T>(sum * scale);
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
template <typename T>
__attribute__((target("avx512f"))) void wide(T* out, const Term<T>* terms, int64_t count, int64_t channels,
                                             Accumulator<T> scale) {
  whole<64>(out, terms, count, channels, scale);
}

template <typename T>
__attribute__((target("avx2"))) void middle(T* out, const Term<T>* terms, int64_t count, int64_t channels,
                                            Accumulator<T> scale) {
  whole<32>(out, terms, count, channels, scale);
}
#endif

template <typename T>
void narrow(T* out, const Term<T>* terms, int64_t count, int64_t channels, Accumulator<T> scale) {
  whole<16>(out, terms, count, channels, scale);
}

template <typename T>
using Kernel = void (*)(T*, const Term<T>*, int64_t, int64_t, Accumulator<T>);

template <typename T>
Kernel<T> best() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f")) return wide<T>;
  if (__builtin_cpu_supports("avx2")) return middle<T>;
#endif
  return narrow<T>;
}

template <typename T>
void dispatch(T* out, const Term<T>* terms, int64_t count, int64_t channels, Accumulator<T> scale) {
  static const Kernel<T> kernel = best<T>();
  kernel(out, terms, count, channels, scale);
}

}  // namespace

void weighted_sum(float* out, const Term<float>* terms, int64_t count, int64_t channels, float scale) {
  dispatch(out, terms, count, channels, scale);
}

void weighted_sum(double* out, const Term<double>* terms, int64_t count, int64_t channels, double scale) {
  dispatch(out, terms, count, channels, scale);
}

void weighted_sum(BFloat16* out, const Term<BFloat16>* terms, int64_t count, int64_t channels, float scale) {
  dispatch(out, terms, count, channels, scale);
}

void weighted_sum(Half* out, const Term<Half>* terms, int64_t count, int64_t channels, float scale) {
  dispatch(out, terms, count, channels, scale);
}

}  // namespace eventlens
