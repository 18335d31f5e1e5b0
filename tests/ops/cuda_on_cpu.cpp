// Runs the CUDA kernels of csrc/ on a CPU, thread by thread: the same source, with a block's threads as fibres.
//
// __syncthreads switches to the next thread of the block, so every thread reaches a barrier before any passes it, and
// what one thread writes to shared memory before a barrier the others read after it. Shared memory is filled with NaN
// before each block. What this cannot show: races without a barrier, alignment faults, speed.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Index {
  int64_t x;
};
static Index threadIdx, blockIdx, blockDim;

namespace {

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  bool alive = false;
};

std::vector<Fibre> fibres(32);
ucontext_t scheduler;
size_t current = 0;
std::function<void()> body;

void enter() {
  body();
  fibres[current].alive = false;
  swapcontext(&fibres[current].context, &scheduler);
}

}  // namespace

static void __syncthreads() { swapcontext(&fibres[current].context, &scheduler); }

#include <torch/headeronly/util/BFloat16.h>

#include "moa_kernels.cuh"
#include "roi_align_kernels.cuh"

namespace eventlens {
alignas(16) unsigned char shared[1 << 18];
}

namespace {

using eventlens::LevelList;
using eventlens::PlanView;

template <typename Kernel>
void launch(int64_t blocks, const Kernel& kernel) {
  body = kernel;
  blockDim.x = static_cast<int64_t>(fibres.size());
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    std::memset(eventlens::shared, 0xff, sizeof(eventlens::shared));
    for (Fibre& fibre : fibres) {
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.data();
      fibre.context.uc_stack.ss_size = fibre.stack.size();
      fibre.context.uc_link = &scheduler;
      makecontext(&fibre.context, enter, 0);
      fibre.alive = true;
    }
    for (bool any = true; any;) {
      any = false;
      for (current = 0; current < fibres.size(); ++current) {
        if (!fibres[current].alive) continue;
        threadIdx.x = static_cast<int64_t>(current);
        swapcontext(&scheduler, &fibres[current].context);
        any = any || fibres[current].alive;
      }
    }
  }
}

template <typename T, typename A, int VEC, int BINS>
void pool(const LevelList<T>& levels, const PlanView<A>& plan, int64_t boxes, int channels, T* out) {
  const int step = 32 * VEC, parts = (channels + step - 1) / step;
  launch(boxes * parts, [&] {
    eventlens::pool_kernel<T, A, VEC, BINS>(levels, plan, channels, parts, A(1) / A(levels.count), out);
  });
}

// sizes: boxes, images, bins_y, bins_x, height, width, prefix, channels, count of levels, image stride, cell stride
template <typename T, typename A, int VEC>
void forward(const void* const* levels, const PlanView<A>& plan, const int64_t* sizes, void* out) {
  LevelList<T> list;
  list.count = static_cast<int>(sizes[8]);
  for (int l = 0; l < list.count; ++l) {
    list.cells[l] = static_cast<const T*>(levels[l]) + sizes[6] * sizes[10];
    list.image_stride[l] = sizes[9];
    list.cell_stride[l] = sizes[10];
  }
  const int channels = static_cast<int>(sizes[7]);
  if (plan.bins_x == 1) return pool<T, A, VEC, 1>(list, plan, sizes[0], channels, static_cast<T*>(out));
  if (plan.bins_x <= 4) return pool<T, A, VEC, 4>(list, plan, sizes[0], channels, static_cast<T*>(out));
  pool<T, A, VEC, 8>(list, plan, sizes[0], channels, static_cast<T*>(out));
}

template <typename T, typename A, int VEC>
void backward(const void* grad, const PlanView<A>& plan, const int64_t* sizes, void* out) {
  const int channels = static_cast<int>(sizes[7]), prefix = static_cast<int>(sizes[6]);
  const int step = 32 * VEC, parts = (channels + step - 1) / step, tiles = (plan.width + 15) / 16;
  launch(plan.images * plan.height * tiles * parts, [&] {
    eventlens::gradient_kernel<T, A, VEC, 16>(static_cast<const T*>(grad), plan, prefix, channels, parts,
                                              A(1) / A(sizes[8]), static_cast<T*>(out));
  });
}

template <typename T, typename A>
void apply(bool is_forward, const void* const* from, const void* wy, const void* wx, const int32_t* window,
           const int64_t* offsets, const int64_t* sizes, void* out) {
  const PlanView<A> plan{static_cast<const A*>(wy), static_cast<const A*>(wx), window, offsets, sizes[1],
                         int(sizes[2]), int(sizes[3]), int(sizes[4]), int(sizes[5])};
  const bool pairs = sizes[7] % 2 == 0 && sizes[9] % 2 == 0 && sizes[10] % 2 == 0;
  if (is_forward) {
    return pairs ? forward<T, A, 2>(from, plan, sizes, out) : forward<T, A, 1>(from, plan, sizes, out);
  }
  return pairs ? backward<T, A, 2>(from[0], plan, sizes, out) : backward<T, A, 1>(from[0], plan, sizes, out);
}

template <typename A>
void plan(const void* boxes, const int64_t* sizes, double scale, int64_t ratio, bool aligned, bool mean, void* wy,
          void* wx, int32_t* window) {
  launch(sizes[0], [&] {
    eventlens::plan_kernel<A>(static_cast<const A*>(boxes), sizes[2], sizes[3], int(sizes[4]), int(sizes[5]),
                              eventlens::Sampling{scale, ratio, aligned}, mean, static_cast<A*>(wy),
                              static_cast<A*>(wx), window);
  });
}

}  // namespace

extern "C" {

// type: 0 float, 1 double, 2 bfloat16
void roi_align_apply(int type, bool is_forward, const void* const* from, const void* wy, const void* wx,
                     const int32_t* window, const int64_t* offsets, const int64_t* sizes, void* out) {
  if (type == 0) return apply<float, float>(is_forward, from, wy, wx, window, offsets, sizes, out);
  if (type == 1) return apply<double, double>(is_forward, from, wy, wx, window, offsets, sizes, out);
  apply<torch::headeronly::BFloat16, float>(is_forward, from, wy, wx, window, offsets, sizes, out);
}

void roi_align_plan(int type, const void* boxes, const int64_t* sizes, double scale, int64_t ratio, bool aligned,
                    bool mean, void* wy, void* wx, int32_t* window) {
  if (type == 1) return plan<double>(boxes, sizes, scale, ratio, aligned, mean, wy, wx, window);
  plan<float>(boxes, sizes, scale, ratio, aligned, mean, wy, wx, window);
}

void moa_route(const float* logits, int64_t tokens, int64_t count, int64_t k, bool renormalise, float* weights,
               int32_t* experts) {
  launch((tokens + 31) / 32, [&] {
    eventlens::route_kernel(logits, tokens, count, k, renormalise, weights, experts);
  });
}

void moa_sort_by_expert(const int32_t* experts, int64_t slots, int num_experts, int32_t* order, int32_t* offsets) {
  const int64_t tiles = (slots + eventlens::TILE - 1) / eventlens::TILE;
  std::vector<int32_t> counts(tiles * num_experts + 1);
  launch(tiles, [&] { eventlens::count_kernel(experts, slots, num_experts, counts.data()); });
  launch(1, [&] { eventlens::scan_kernel(int(tiles), num_experts, counts.data(), offsets); });
  launch(tiles, [&] { eventlens::place_kernel(experts, slots, num_experts, counts.data(), order); });
}

void moa_gather(const float* x, const int32_t* order, int64_t slots, int64_t k, int64_t channels, float* out) {
  launch(slots, [&] { eventlens::gather_kernel<float>(x, order, k, channels, out); });
}

void moa_combine(const float* y, const int32_t* order, const float* weights, int64_t tokens, int64_t k,
                 int64_t channels, float* out) {
  std::vector<int32_t> rows(tokens * k);
  launch((tokens * k + 31) / 32, [&] { eventlens::invert_kernel(order, tokens * k, rows.data()); });
  launch(tokens, [&] { eventlens::combine_kernel<float, float>(y, rows.data(), weights, k, channels, out); });
}

}  // extern "C"
