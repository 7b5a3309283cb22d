// Cross-entropy over a part of the vocabulary, from logits of any type without a copy of them in fp32.
#pragma once
#include "rows.h"

namespace megalite {

template <class T, class L>
ROW_FN void cross_entropy_forward(const L& g, const CrossEntropy& a, int64_t row) {
  const int valid = static_cast<int>(a.valid), columns = static_cast<int>(a.shape.columns);
  const T* x = static_cast<const T*>(a.logits) + row * a.shape.columns;
  const auto input = [&](const auto& g, int k) {
    return g.inside(g.column(k), valid, g.load(x, g.column(k), valid, columns), -kInfinity);
  };
  auto top = g.splat(-kInfinity);
  each(g, valid, [&](const auto& g, int k) { top = g.max(input(g, k), top); });
  const float largest = g.reduce_max(top), shift = largest == -kInfinity ? 0 : largest;
  auto sums = g.splat(0.f);
  each(g, valid, [&](const auto& g, int k) { sums = sums + g.exp(input(g, k) - shift); });
  const float sum = g.reduce_sum(sums);
  if (g.first()) {
    const int64_t label = a.labels[row];
    a.top[row] = largest;
    a.sum[row] = sum;
    a.target[row] = label >= 0 && label < valid ? g.value(x[label]) : 0;
  }
}

template <class T, class L>
ROW_FN void cross_entropy_backward(const L& g, const CrossEntropy& a, int64_t row) {
  const int valid = static_cast<int>(a.valid), columns = static_cast<int>(a.shape.columns);
  T* x = static_cast<T*>(a.logits) + row * a.shape.columns;
  const float lse = a.lse[row], grad = a.grad[row];
  const int64_t label = a.labels[row];
  const int target = label >= 0 && label < valid ? static_cast<int>(label) : -1;
  each(g, valid, [&](const auto& g, int k) {
    const int c = g.column(k);
    const auto p = g.exp(g.inside(c, valid, g.load(x, c, valid, columns), -kInfinity) - lse);
    g.store(x, c, columns, g.inside(c, valid, (p - g.one_at(target - c)) * grad, 0.f));
  });
  g.fill(x, valid, columns, 0.f);
}

}  // namespace megalite
