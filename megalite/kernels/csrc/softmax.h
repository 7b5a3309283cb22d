// Softmax of attention scores: scale, mask, softmax and dropout of a row, forward and backward.
#pragma once
#include "rows.h"

namespace megalite {

// scale * x in the visible columns of step k, -inf in others. `columns` is the length of the row in memory.
template <class L, class T>
ROW_FN typename L::V score(const L& g, int k, const T* x, const uint8_t* mask, int visible, int columns,
                             float scale) {
  const int c = g.column(k);
  auto v = g.load(x, c, visible, columns) * scale;
  if (mask) v = g.select(g.load_mask(mask, c, visible, columns), v, -kInfinity);
  return g.inside(c, visible, v, -kInfinity);
}

template <class L>
ROW_FN bool any_visible(const L& g, const uint8_t* mask, int visible, int columns) {
  if (!mask) return visible > 0;
  auto seen = g.splat(0.f);
  for (int k = 0; k < g.steps(visible); ++k) {
    const int c = g.column(k);
    seen = g.max(seen, g.inside(c, visible, g.select(g.load_mask(mask, c, visible, columns), g.splat(1.f), 0.f), 0.f));
  }
  return g.reduce_max(seen) > 0;
}

// One row of the forward; returns lse. The first `visible` columns may be seen, those of them that the mask says are.
template <bool kDropout, class L, class T>
ROW_FN float softmax_forward_row(const L& g, const Softmax& a, const T* x, const uint8_t* mask, T* y, int visible,
                                 const Counter& counter) {
  const int columns = static_cast<int>(a.shape.columns);
  const auto input = [&](const auto& g, int k) { return score(g, k, x, mask, visible, columns, a.scale); };
  auto top = g.splat(-kInfinity);
  each(g, visible, [&](const auto& g, int k) {
    const auto v = input(g, k);
    g.will_read(x + columns + g.column(k));  // of the next row: the processor's own look ahead ends with this one
    if constexpr (L::kKeepsInputs) g.keep(0, k, v);
    top = g.max(v, top);  // of a NaN and a number, the number: the NaN will reach the sum
  });
  float shift = g.reduce_max(top);
  if (shift == -kInfinity) shift = 0;
  const auto power = [&](const auto& g, int k) {
    return g.exp(kept_or<L::kKeepsInputs>(g, 0, k, [&] { return input(g, k); }) - shift);
  };
  auto sums = g.splat(0.f);
  each(g, visible, [&](const auto& g, int k) {
    const auto v = power(g, k);
    g.will_write(y + g.column(k));
    if constexpr (L::kKeepsResults) g.keep(0, k, v);
    sums = sums + v;
  });
  const float total = g.reduce_sum(sums);
  float factor = 1 / total, lse = shift + g.log(total);
  if (total == 0) {  // nothing is visible, or -inf is all there is to see: then NaN, as torch has it
    const bool any = any_visible(g, mask, visible, columns);
    factor = any ? __builtin_nanf("") : 0;
    lse = any ? factor : kInfinity;
  }
  const float kept_factor = kDropout ? factor * a.dropout.factor : factor;
  each_element<kDropout>(g, visible, a.dropout, counter, [&](const auto& g, int k, auto kept) {
    auto v = kept_or<L::kKeepsResults>(g, 0, k, [&] { return g.exp(input(g, k) - shift); }) * kept_factor;
    if constexpr (kDropout) v = g.select(kept, v, 0.f);
    g.store(y, g.column(k), columns, v);
  });
  g.fill(y, visible, columns, 0 * factor);
  return lse;
}

// One row of the backward without dropout: dx = scale * y * (dy - sum(y * dy)).
template <class L, class T>
ROW_FN void softmax_backward_row(const L& g, const Softmax& a, const T* dy, const T* y, T* dx, int visible) {
  const int columns = static_cast<int>(a.shape.columns);
  const auto load = [&](const auto& g, const T* p, int k) { return g.load(p, g.column(k), visible, columns); };
  auto sums = g.splat(0.f);
  each(g, visible, [&](const auto& g, int k) {
    const auto p = load(g, y, k), d = load(g, dy, k);
    g.will_read(y + columns + g.column(k));
    g.will_read(dy + columns + g.column(k));
    if constexpr (L::kKeepsInputs) g.keep(0, k, p), g.keep(1, k, d);
    sums = sums + p * d;
  });
  const float sum = g.reduce_sum(sums);
  each(g, visible, [&](const auto& g, int k) {
    const auto p = kept_or<L::kKeepsInputs>(g, 0, k, [&] { return load(g, y, k); });
    const auto d = kept_or<L::kKeepsInputs>(g, 1, k, [&] { return load(g, dy, k); });
    g.store(dx, g.column(k), columns, p * (d - sum) * a.scale);
  });
  g.fill(dx, visible, columns, 0.f);
}

// The same with dropout, from the scores and lse: p = exp(scale * x - lse), d = dropout(dy).
template <class L, class T>
ROW_FN void softmax_dropout_backward_row(const L& g, const Softmax& a, const T* dy, const T* x, const uint8_t* mask,
                                         float lse, T* dx, int visible, const Counter& counter) {
  const int columns = static_cast<int>(a.shape.columns);
  const auto power = [&](const auto& g, int k) { return g.exp(score(g, k, x, mask, visible, columns, a.scale) - lse); };
  const auto dropped = [&](const auto& g, int k, auto kept) {
    return g.select(kept, g.load(dy, g.column(k), visible, columns) * a.dropout.factor, 0.f);
  };
  auto sums = g.splat(0.f);
  each_with_dropout(g, visible, a.dropout, counter, [&](const auto& g, int k, auto kept) {
    const auto p = power(g, k), d = dropped(g, k, kept);
    g.will_read(x + columns + g.column(k));
    g.will_read(dy + columns + g.column(k));
    if constexpr (L::kKeepsResults) g.keep(0, k, p), g.keep(1, k, d);
    sums = sums + p * d;
  });
  const float sum = g.reduce_sum(sums);
  each_element<!L::kKeepsResults>(g, visible, a.dropout, counter, [&](const auto& g, int k, auto kept) {
    const auto p = kept_or<L::kKeepsResults>(g, 0, k, [&] { return power(g, k); });
    const auto d = kept_or<L::kKeepsResults>(g, 1, k, [&] { return dropped(g, k, kept); });
    g.store(dx, g.column(k), columns, p * (d - sum) * a.scale);
  });
  g.fill(dx, visible, columns, 0.f);
}

template <bool kDropout, class T, class L>
ROW_APART void softmax_forward(const L& g, const Softmax& a, int64_t row) {
  const int64_t columns = a.shape.columns, query = row % a.shape.size[2];
  const int visible = static_cast<int>(a.causal && query + 1 < columns ? query + 1 : columns);
  const float lse = softmax_forward_row<kDropout>(
      g, a, static_cast<const T*>(a.x) + row * columns, at(a.mask, a.shape, row),
      static_cast<T*>(a.out) + row * columns, visible, counter_of(a.dropout, a.shape, row));
  if (g.first()) a.lse[row] = lse;
}

template <bool kDropout, class T, class L>
ROW_APART void softmax_backward(const L& g, const Softmax& a, int64_t row) {
  const int64_t columns = a.shape.columns, query = row % a.shape.size[2];
  const int visible = static_cast<int>(a.causal && query + 1 < columns ? query + 1 : columns);
  const T* dy = static_cast<const T*>(a.grad) + row * columns;
  T* dx = static_cast<T*>(a.out) + row * columns;
  if constexpr (kDropout)
    softmax_dropout_backward_row(g, a, dy, static_cast<const T*>(a.x) + row * columns, at(a.mask, a.shape, row),
                                 a.lse[row], dx, visible, counter_of(a.dropout, a.shape, row));
  else softmax_backward_row(g, a, dy, static_cast<const T*>(a.y) + row * columns, dx, visible);
}

// Dropout or not, known at run time.
template <class T, class L>
ROW_FN void softmax_forward(const L& g, const Softmax& a, int64_t row) {
  if (a.dropout.rows.data) softmax_forward<true, T>(g, a, row);
  else softmax_forward<false, T>(g, a, row);
}

template <class T, class L>
ROW_FN void softmax_backward(const L& g, const Softmax& a, int64_t row) {
  if (a.dropout.rows.data) softmax_backward<true, T>(g, a, row);
  else softmax_backward<false, T>(g, a, row);
}

}  // namespace megalite
