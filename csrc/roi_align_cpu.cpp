// RoI-align on the CPU: plan, forward and backward over the plan's tables.
//
// A bin is a weighted sum of a few cells, and the gradient of a cell a weighted sum of a few bins: both are rows of a
// sparse matrix, whose terms are listed here and summed by weighted_sum. One thread owns each output row, so backward
// needs no atomics and no zero fill, and the sum runs over RoIs in their order. Cells without weight are never read.
#include "checks.h"
#include "roi_align_plan.h"
#include "weighted_sum.h"

#include <cstring>
#include <type_traits>

namespace eventlens {
namespace {

template <typename W>
void plan_boxes(const Tensor& boxes, int64_t bins_y, int64_t bins_x, const Sampling& sampling, bool mean,
                const Tensor& wy, const Tensor& wx, const Tensor& window) {
  const int64_t height = wy.size(2), width = wx.size(2), rows = wy.size(1), columns = wx.size(1);
  const W* box = boxes.const_data_ptr<W>();
  W* to_y = wy.mutable_data_ptr<W>();
  W* to_x = wx.mutable_data_ptr<W>();
  int32_t* to_window = window.mutable_data_ptr<int32_t>();
  const auto axis = [&](const Interval<W>& along, int64_t bins, int64_t tables, int64_t cells, W* to) {
    Range support{static_cast<int32_t>(cells), 0};
    for (int64_t p = 0; p < tables; ++p) {
      const Range range = axis_weights(along, bins, p, mean ? bins : p + 1, static_cast<int32_t>(cells), sampling,
                                       to + p * cells);
      if (range.begin == range.end) continue;
      support = {std::min(support.begin, range.begin), std::max(support.end, range.end)};
    }
    return support.begin < support.end ? support : Range{0, 0};
  };
  for_each_task<char>(boxes.size(0), rows * height + columns * width, [&](int64_t r, char&) {
    const W* b = box + 4 * r;
    const Range y = axis(interval(b[1], b[3], sampling), bins_y, rows, height, to_y + r * rows * height);
    const Range x = axis(interval(b[0], b[2], sampling), bins_x, columns, width, to_x + r * columns * width);
    const int32_t bounds[4] = {y.begin, y.end, x.begin, x.end};
    std::memcpy(to_window + 4 * r, bounds, sizeof(bounds));
  });
}

std::tuple<Tensor, Tensor, Tensor> plan(const Tensor& boxes, int64_t height, int64_t width, int64_t bins_y,
                                        int64_t bins_x, double spatial_scale, int64_t sampling_ratio, bool aligned,
                                        bool mean) {
  check_dense(boxes, "boxes", 2, boxes.scalar_type(), false);
  check_size(boxes, "boxes", 1, 4);
  const int64_t count = boxes.size(0);
  Tensor wy = torch::stable::new_empty(boxes, {count, mean ? 1 : bins_y, height});
  Tensor wx = torch::stable::new_empty(boxes, {count, mean ? 1 : bins_x, width});
  Tensor window = torch::stable::new_empty(boxes, {count, 4}, ScalarType::Int);
  const Sampling sampling{spatial_scale, sampling_ratio, aligned};
  with_table_type(boxes.scalar_type(), "boxes", [&](auto zero) {
    plan_boxes<decltype(zero)>(boxes, bins_y, bins_x, sampling, mean, wy, wx, window);
  });
  return {wy, wx, window};
}

// The plan as the kernels below read it; W is the type that sums run in.
template <typename W>
struct Plan {
  Plan(const Tensor& wy, const Tensor& wx, const Tensor& windows, const Tensor& offsets)
      : boxes(wy.size(0)), bins_y(wy.size(1)), bins_x(wx.size(1)), height(wy.size(2)), width(wx.size(2)),
        images(offsets.size(0) - 1), y(wy.const_data_ptr<W>()), x(wx.const_data_ptr<W>()),
        window(windows.const_data_ptr<int32_t>()), first(offsets.const_data_ptr<int64_t>()) {
    const ScalarType table = std::is_same_v<W, double> ? ScalarType::Double : ScalarType::Float;
    check_dense(wy, "wy", 3, table, false);
    check_dense(wx, "wx", 3, table, false);
    check_dense(windows, "window", 2, ScalarType::Int, false);
    check_dense(offsets, "offsets", 1, ScalarType::Long, false);
    check_size(wx, "wx", 0, boxes);
    check_size(windows, "window", 0, boxes);
    check_size(windows, "window", 1, 4);
    STD_TORCH_CHECK(first[0] == 0 && first[images] == boxes, "offsets run from ", first[0], " to ", first[images],
                    " but there are ", boxes, " boxes");
    for (int64_t b = 0; b < images; ++b) {
      STD_TORCH_CHECK(first[b] <= first[b + 1], "offsets fall from ", first[b], " to ", first[b + 1]);
    }
    for (int64_t r = 0; r < boxes; ++r) {
      const int32_t* w = window + 4 * r;
      STD_TORCH_CHECK(0 <= w[0] && w[1] <= height && 0 <= w[2] && w[3] <= width, "window ", r, " leaves the grid of ",
                      height, " x ", width);
    }
  }

  int64_t image_of(int64_t box) const { return std::upper_bound(first, first + images + 1, box) - first - 1; }
  W weight_y(int64_t r, int64_t p, int64_t i) const { return y[(r * bins_y + p) * height + i]; }
  W weight_x(int64_t r, int64_t q, int64_t j) const { return x[(r * bins_x + q) * width + j]; }

  int64_t boxes, bins_y, bins_x, height, width, images;
  const W* y;
  const W* x;
  const int32_t* window;
  const int64_t* first;
};

template <typename T>
struct Level {
  const T* cells;  // first cell of the first image
  int64_t image_stride;
  int64_t cell_stride;
};

template <typename T>
std::vector<Level<T>> levels_of(const std::vector<Tensor>& tensors, int64_t images, int64_t prefix, int64_t tokens) {
  std::vector<Level<T>> levels;
  for (const Tensor& tensor : tensors) {
    check_layout(tensor, "levels", 3, false);
    check_size(tensor, "levels", 0, images);
    check_size(tensor, "levels", 1, tokens);
    check_size(tensor, "levels", 2, tensors[0].size(2));
    STD_TORCH_CHECK(tensor.scalar_type() == tensors[0].scalar_type(), "levels differ in dtype");
    STD_TORCH_CHECK(tensor.stride(2) == 1 || tensor.size(2) <= 1, "channels must be dense, their stride is ",
                    tensor.stride(2));
    levels.push_back({tensor.const_data_ptr<T>() + prefix * tensor.stride(1), tensor.stride(0), tensor.stride(1)});
  }
  return levels;
}

template <typename T>
void pool(const std::vector<Level<T>>& levels, const Plan<Accumulator<T>>& plan, int64_t channels, T* out) {
  using A = Accumulator<T>;
  const A scale = A(1) / A(levels.size());
  const int64_t cost = 8 * plan.bins_x * channels;
  for_each_task<std::vector<Term<T>>>(plan.boxes * plan.bins_y, cost, [&](int64_t task, std::vector<Term<T>>& terms) {
    const int64_t r = task / plan.bins_y, p = task % plan.bins_y, image = plan.image_of(r);
    const int32_t* window = plan.window + 4 * r;
    for (int64_t q = 0; q < plan.bins_x; ++q) {
      terms.clear();
      for (int64_t i = window[0]; i < window[1]; ++i) {
        const A row_weight = plan.weight_y(r, p, i);
        if (row_weight == A(0)) continue;
        for (int64_t j = window[2]; j < window[3]; ++j) {
          const A weight = row_weight * plan.weight_x(r, q, j);
          if (weight == A(0)) continue;
          for (const Level<T>& level : levels) {
            const int64_t at = image * level.image_stride + (i * plan.width + j) * level.cell_stride;
            terms.push_back({level.cells + at, weight});
          }
        }
      }
      weighted_sum(out + (task * plan.bins_x + q) * channels, terms.data(), terms.size(), channels, scale);
    }
  });
}

Tensor forward(const std::vector<Tensor>& levels, const Tensor& wy, const Tensor& wx, const Tensor& window,
               const Tensor& offsets, int64_t height, int64_t width, int64_t prefix) {
  STD_TORCH_CHECK(!levels.empty(), "at least one level is needed, got 0");
  check_size(wy, "wy", 2, height);
  check_size(wx, "wx", 2, width);
  const int64_t channels = levels[0].size(2);
  Tensor out = torch::stable::new_empty(levels[0], {wy.size(0), wy.size(1), wx.size(1), channels});
  with_float_type(levels[0].scalar_type(), "levels", [&](auto zero) {
    using T = decltype(zero);
    const Plan<Accumulator<T>> plan(wy, wx, window, offsets);
    pool(levels_of<T>(levels, plan.images, prefix, prefix + height * width), plan, channels, out.mutable_data_ptr<T>());
  });
  return out;
}

// What one thread of `row_gradient` keeps: the bins of a RoI that weigh a row of cells, and its terms.
template <typename T>
struct RowScratch {
  struct Box {
    int64_t index;
    size_t first, last;  // its entries in `bins`
  };
  std::vector<Box> boxes;
  std::vector<std::pair<int64_t, Accumulator<T>>> bins;
  std::vector<Term<T>> terms;
};

// Gradient of one row of cells of one image: every cell is the weighted sum of the bins that read it.
template <typename T>
void row_gradient(const T* grad, const Plan<Accumulator<T>>& plan, int64_t image, int64_t i, int64_t channels,
                  Accumulator<T> scale, T* out, RowScratch<T>& scratch) {
  using A = Accumulator<T>;
  scratch.boxes.clear();
  scratch.bins.clear();
  for (int64_t r = plan.first[image]; r < plan.first[image + 1]; ++r) {
    if (i < plan.window[4 * r] || i >= plan.window[4 * r + 1]) continue;
    const size_t first = scratch.bins.size();
    for (int64_t p = 0; p < plan.bins_y; ++p) {
      const A weight = plan.weight_y(r, p, i);
      if (weight != A(0)) scratch.bins.emplace_back(p, weight);
    }
    scratch.boxes.push_back({r, first, scratch.bins.size()});
  }
  for (int64_t j = 0; j < plan.width; ++j) {
    scratch.terms.clear();
    for (const auto& box : scratch.boxes) {
      const int32_t* window = plan.window + 4 * box.index;
      if (j < window[2] || j >= window[3]) continue;
      for (int64_t q = 0; q < plan.bins_x; ++q) {
        const A weight = plan.weight_x(box.index, q, j);
        if (weight == A(0)) continue;
        for (size_t k = box.first; k < box.last; ++k) {
          const int64_t bin = (box.index * plan.bins_y + scratch.bins[k].first) * plan.bins_x + q;
          scratch.terms.push_back({grad + bin * channels, scratch.bins[k].second * weight});
        }
      }
    }
    weighted_sum(out + j * channels, scratch.terms.data(), scratch.terms.size(), channels, scale);
  }
}

Tensor backward(const Tensor& grad, const Tensor& wy, const Tensor& wx, const Tensor& window, const Tensor& offsets,
                int64_t height, int64_t width, int64_t prefix, int64_t batch, int64_t num_levels) {
  check_dense(grad, "grad", 4, grad.scalar_type(), false);
  check_size(grad, "grad", 0, wy.size(0));
  check_size(grad, "grad", 1, wy.size(1));
  check_size(grad, "grad", 2, wx.size(1));
  check_size(wy, "wy", 2, height);
  check_size(wx, "wx", 2, width);
  check_size(offsets, "offsets", 0, batch + 1);
  STD_TORCH_CHECK(num_levels > 0, "at least one level is needed, got ", num_levels);
  const int64_t channels = grad.size(3), tokens = prefix + height * width;
  Tensor out = torch::stable::new_empty(grad, {batch, tokens, channels});
  with_float_type(grad.scalar_type(), "grad", [&](auto zero) {
    using T = decltype(zero);
    const Plan<Accumulator<T>> plan(wy, wx, window, offsets);
    const T* from = grad.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const Accumulator<T> scale = Accumulator<T>(1) / Accumulator<T>(num_levels);
    for_each_task<RowScratch<T>>(batch * height, 4 * width * channels, [&](int64_t task, RowScratch<T>& scratch) {
      T* image = to + task / height * tokens * channels;
      const int64_t i = task % height;
      if (i == 0) std::memset(static_cast<void*>(image), 0, prefix * channels * sizeof(T));
      row_gradient(from, plan, task / height, i, channels, scale, image + (prefix + i * width) * channels, scratch);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eventlens_csrc, CPU, m) {
  m.impl("roi_align_plan", TORCH_BOX(&plan));
  m.impl("roi_align_forward", TORCH_BOX(&forward));
  m.impl("roi_align_backward", TORCH_BOX(&backward));
}

}  // namespace eventlens
