// RoI-align on a GPU: plan, forward and backward; kernels and their layout are in roi_align_kernels.cuh.
//
// Channels are read in pairs where pointers, strides and their number allow it, one by one otherwise. Nothing here
// waits for the device: offsets and windows stay there, and grid sizes follow from shapes alone.
#include "cuda_launch.h"
#include "roi_align_kernels.cuh"
#include "weighted_sum.h"

#include <type_traits>

namespace eventlens {
namespace {

constexpr int THREADS = 256;
constexpr int CELLS = 16;

std::tuple<Tensor, Tensor, Tensor> plan(const Tensor& boxes, int64_t height, int64_t width, int64_t bins_y,
                                        int64_t bins_x, double spatial_scale, int64_t sampling_ratio, bool aligned,
                                        bool mean) {
  check_dense(boxes, "boxes", 2, boxes.scalar_type(), true);
  check_size(boxes, "boxes", 1, 4);
  const int64_t count = boxes.size(0), rows_y = mean ? 1 : bins_y, rows_x = mean ? 1 : bins_x;
  Tensor wy = torch::stable::new_empty(boxes, {count, rows_y, height});
  Tensor wx = torch::stable::new_empty(boxes, {count, rows_x, width});
  Tensor window = torch::stable::new_empty(boxes, {count, 4}, ScalarType::Int);
  if (count == 0) return {wy, wx, window};
  const Launch launch(boxes);
  with_table_type(boxes.scalar_type(), "boxes", [&](auto zero) {
    using A = decltype(zero);
    const size_t bytes = (rows_y + rows_x) * sizeof(Range);
    allow_shared(plan_kernel<A>, bytes);
    plan_kernel<A><<<blocks(count), 64, bytes, launch.stream()>>>(
        boxes.const_data_ptr<A>(), bins_y, bins_x, static_cast<int>(height), static_cast<int>(width),
        Sampling{spatial_scale, sampling_ratio, aligned}, mean, wy.mutable_data_ptr<A>(), wx.mutable_data_ptr<A>(),
        window.mutable_data_ptr<int32_t>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {wy, wx, window};
}

template <typename A>
PlanView<A> view_of(const Tensor& wy, const Tensor& wx, const Tensor& window, const Tensor& offsets, int64_t height,
                    int64_t width) {
  const ScalarType table = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  check_dense(wy, "wy", 3, table, true);
  check_dense(wx, "wx", 3, table, true);
  check_dense(window, "window", 2, ScalarType::Int, true);
  check_dense(offsets, "offsets", 1, ScalarType::Long, true);
  check_size(wx, "wx", 0, wy.size(0));
  check_size(window, "window", 0, wy.size(0));
  check_size(window, "window", 1, 4);
  check_size(wy, "wy", 2, height);
  check_size(wx, "wx", 2, width);
  return {wy.const_data_ptr<A>(), wx.const_data_ptr<A>(), window.const_data_ptr<int32_t>(),
          offsets.const_data_ptr<int64_t>(), offsets.size(0) - 1, static_cast<int>(wy.size(1)),
          static_cast<int>(wx.size(1)), static_cast<int>(height), static_cast<int>(width)};
}

template <typename T, int VEC, int BINS>
void launch_pool(const LevelList<T>& levels, const PlanView<Accumulator<T>>& plan, int64_t boxes, int64_t channels,
                 T* out, cudaStream_t stream) {
  using A = Accumulator<T>;
  const int64_t channel_blocks = (channels + THREADS * VEC - 1) / (THREADS * VEC);
  const size_t bytes = (size_t(plan.width) * BINS + size_t(plan.bins_y) * plan.height) * sizeof(A);
  const auto kernel = pool_kernel<T, A, VEC, BINS>;
  allow_shared(kernel, bytes);
  kernel<<<blocks(boxes * channel_blocks), THREADS, bytes, stream>>>(
      levels, plan, static_cast<int>(channels), static_cast<int>(channel_blocks), A(1) / A(levels.count), out);
}

template <typename T, int VEC>
void launch_pool(const LevelList<T>& levels, const PlanView<Accumulator<T>>& plan, int64_t boxes, int64_t channels,
                 T* out, cudaStream_t stream) {
  if (plan.bins_x == 1) return launch_pool<T, VEC, 1>(levels, plan, boxes, channels, out, stream);
  if (plan.bins_x <= 4) return launch_pool<T, VEC, 4>(levels, plan, boxes, channels, out, stream);
  launch_pool<T, VEC, 8>(levels, plan, boxes, channels, out, stream);
}

template <typename T>
bool paired(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (2 * sizeof(T)) == 0;
}

Tensor forward(const std::vector<Tensor>& tensors, const Tensor& wy, const Tensor& wx, const Tensor& window,
               const Tensor& offsets, int64_t height, int64_t width, int64_t prefix) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  STD_TORCH_CHECK(1 <= count && count <= MAX_LEVELS, "1 to ", MAX_LEVELS, " levels fit one launch, got ", count);
  const int64_t channels = tensors[0].size(2), boxes = wy.size(0);
  Tensor out = torch::stable::new_empty(tensors[0], {boxes, wy.size(1), wx.size(1), channels});
  with_float_type(tensors[0].scalar_type(), "levels", [&](auto zero) {
    using T = decltype(zero);
    const auto plan = view_of<Accumulator<T>>(wy, wx, window, offsets, height, width);
    LevelList<T> levels;
    levels.count = static_cast<int>(count);
    bool pairs = channels % 2 == 0;
    for (int64_t l = 0; l < count; ++l) {
      const Tensor& tensor = tensors[l];
      check_layout(tensor, "levels", 3, true);
      check_size(tensor, "levels", 0, plan.images);
      check_size(tensor, "levels", 1, prefix + height * width);
      check_size(tensor, "levels", 2, channels);
      STD_TORCH_CHECK(tensor.scalar_type() == tensors[0].scalar_type(), "levels differ in dtype");
      STD_TORCH_CHECK(tensor.stride(2) == 1 || channels <= 1, "channels must be dense, their stride is ",
                      tensor.stride(2));
      levels.cells[l] = tensor.const_data_ptr<T>() + prefix * tensor.stride(1);
      levels.image_stride[l] = tensor.stride(0);
      levels.cell_stride[l] = tensor.stride(1);
      pairs = pairs && paired<T>(levels.cells[l]) && tensor.stride(0) % 2 == 0 && tensor.stride(1) % 2 == 0;
    }
    if (boxes == 0 || channels == 0) return;
    const Launch launch(tensors[0]);
    T* to = out.mutable_data_ptr<T>();
    if (pairs) {
      launch_pool<T, 2>(levels, plan, boxes, channels, to, launch.stream());
    } else {
      launch_pool<T, 1>(levels, plan, boxes, channels, to, launch.stream());
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

template <typename T, int VEC>
void launch_gradient(const T* grad, const PlanView<Accumulator<T>>& plan, int64_t prefix, int64_t channels,
                     int64_t num_levels, T* out, cudaStream_t stream) {
  using A = Accumulator<T>;
  const int64_t channel_blocks = (channels + THREADS * VEC - 1) / (THREADS * VEC);
  const int64_t tiles = (plan.width + CELLS - 1) / CELLS;
  const size_t bytes = (size_t(plan.bins_x) * CELLS + plan.bins_y) * sizeof(A) + plan.bins_x * sizeof(uint32_t);
  const auto kernel = gradient_kernel<T, A, VEC, CELLS>;
  allow_shared(kernel, bytes);
  kernel<<<blocks(plan.images * plan.height * tiles * channel_blocks), THREADS, bytes, stream>>>(
      grad, plan, static_cast<int>(prefix), static_cast<int>(channels), static_cast<int>(channel_blocks),
      A(1) / A(num_levels), out);
}

Tensor backward(const Tensor& grad, const Tensor& wy, const Tensor& wx, const Tensor& window, const Tensor& offsets,
                int64_t height, int64_t width, int64_t prefix, int64_t batch, int64_t num_levels) {
  check_dense(grad, "grad", 4, grad.scalar_type(), true);
  check_size(grad, "grad", 0, wy.size(0));
  check_size(grad, "grad", 1, wy.size(1));
  check_size(grad, "grad", 2, wx.size(1));
  check_size(offsets, "offsets", 0, batch + 1);
  STD_TORCH_CHECK(num_levels > 0, "at least one level is needed, got ", num_levels);
  const int64_t channels = grad.size(3);
  Tensor out = torch::stable::new_empty(grad, {batch, prefix + height * width, channels});
  with_float_type(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    const auto plan = view_of<Accumulator<T>>(wy, wx, window, offsets, height, width);
    if (out.numel() == 0) return;
    const Launch launch(grad);
    const T* from = grad.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    if (channels % 2 == 0 && paired<T>(from)) {
      launch_gradient<T, 2>(from, plan, prefix, channels, num_levels, to, launch.stream());
    } else {
      launch_gradient<T, 1>(from, plan, prefix, channels, num_levels, to, launch.stream());
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eventlens_csrc, CUDA, m) {
  m.impl("roi_align_plan", TORCH_BOX(&plan));
  m.impl("roi_align_forward", TORCH_BOX(&forward));
  m.impl("roi_align_backward", TORCH_BOX(&backward));
}

}  // namespace eventlens
