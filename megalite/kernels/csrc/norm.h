// RMSNorm (Zhang and Sennrich 2019) of x + residual. A lane group takes a group of rows, one after another: in the
// backward each lane adds up what its columns of these rows give to the gradient of the weight.
#pragma once
#include "rows.h"

namespace megalite {

template <class T, class L>
ROW_FN void rms_norm_forward_row(const L& g, const RmsNorm& a, int64_t row) {
  const int columns = static_cast<int>(a.shape.columns);
  const int64_t start = row * columns;
  const T *x = static_cast<const T*>(a.x) + start, *residual = static_cast<const T*>(a.residual);
  const auto input = [&](const auto& g, int k) {
    const int c = g.column(k);
    auto v = g.load(x, c, columns, columns);
    if (residual) v = v + g.load(residual + start, c, columns, columns);
    return v;
  };
  auto squares = g.splat(0.f);
  each(g, columns, [&](const auto& g, int k) {
    const auto v = input(g, k);
    if (residual) g.store(static_cast<T*>(a.sum) + start, g.column(k), columns, v);
    squares = squares + v * v;
  });
  const float scale = 1 / g.sqrt(g.reduce_sum(squares) / columns + a.epsilon);
  each(g, columns, [&](const auto& g, int k) {
    const int c = g.column(k);
    const auto w = g.load(static_cast<const T*>(a.weight), c, columns, columns);
    g.store(static_cast<T*>(a.out) + start, c, columns, input(g, k) * scale * w);
  });
  if (g.first()) a.scale[row] = scale;
}

// With n = s * scale (scale = 1 / rms): ds = scale * (w dy - n * mean(w dy n)), dw = sum over rows of dy n.
template <class T, class L>
ROW_FN void rms_norm_backward_row(const L& g, const RmsNorm& a, int64_t row, float* grad_weight) {
  const int columns = static_cast<int>(a.shape.columns);
  const int64_t start = row * columns;
  const float scale = a.scale[row];
  const T *x = static_cast<const T*>(a.x) + start, *dy = static_cast<const T*>(a.grad) + start;
  const T *weight = static_cast<const T*>(a.weight), *grad_sum = static_cast<const T*>(a.grad_sum);
  auto products = g.splat(0.f);
  each(g, columns, [&](const auto& g, int k) {
    const int c = g.column(k);
    const auto d = g.load(dy, c, columns, columns), n = g.load(x, c, columns, columns) * scale;
    g.store(grad_weight, c, columns, g.load(grad_weight, c, columns, columns) + d * n);
    products = products + d * g.load(weight, c, columns, columns) * n;
  });
  const float mean = g.reduce_sum(products) / columns;
  each(g, columns, [&](const auto& g, int k) {
    const int c = g.column(k);
    const auto d = g.load(dy, c, columns, columns) * g.load(weight, c, columns, columns);
    auto v = scale * (d - g.load(x, c, columns, columns) * scale * mean);
    if (grad_sum) v = v + g.load(grad_sum + start, c, columns, columns);
    g.store(static_cast<T*>(a.out) + start, c, columns, v);
  });
}

template <class F>
ROW_FN void each_of_group(const RmsNorm& a, int64_t group, F f) {
  for (int64_t row = group * a.group; row < (group + 1) * a.group && row < a.rows; ++row) f(row);
}

template <class T, class L>
ROW_FN void rms_norm_forward(const L& g, const RmsNorm& a, int64_t group) {
  each_of_group(a, group, [&](int64_t row) { rms_norm_forward_row<T>(g, a, row); });
}

template <class T, class L>
ROW_FN void rms_norm_backward(const L& g, const RmsNorm& a, int64_t group) {
  const int columns = static_cast<int>(a.shape.columns);
  float* grad_weight = a.grad_weight + group * columns;
  each(g, columns, [&](const auto& g, int k) { g.store(grad_weight, g.column(k), columns, g.splat(0.f)); });
  each_of_group(a, group, [&](int64_t row) { rms_norm_backward_row<T>(g, a, row, grad_weight); });
}

}  // namespace megalite
