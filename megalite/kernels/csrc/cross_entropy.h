// Cross-entropy over a part of the vocabulary, from logits of any type without a copy of them in fp32.
#pragma once
#include "rows.h"

namespace megalite {

constexpr int kAhead = 8;  // steps whose largest is found before their exp: a ninth exp makes up for it

// Each lane has its own largest and the sum of exp(x - largest), which is scaled down when a larger x comes (Milakov and
// Gimelshein 2018), so that the logits are read once.
template <class T, class L>
ROW_FN void cross_entropy_forward(const L& g, const CrossEntropy& a, int64_t row) {
  const int valid = static_cast<int>(a.valid), columns = static_cast<int>(a.shape.columns);
  const T* x = static_cast<const T*>(a.logits) + row * a.shape.columns;
  auto top = g.splat(kLowest), sums = g.splat(0.f);
  by_steps<kAhead>(g, valid, [&](const auto& g, int k) {
    typename L::V ahead[kAhead];
    auto larger = top;
    ROW_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int c = g.column(k + i);
      ahead[i] = g.inside(c, valid, g.load(x, c, valid, columns), -kInfinity);
      larger = g.max(ahead[i], larger);
    }
    sums = sums * g.exp(top - larger);
    ROW_UNROLL
    for (int i = 0; i < kAhead; ++i) sums = sums + g.exp(ahead[i] - larger);
    top = larger;
  });
  const float largest = g.reduce_max(top);
  const float sum = g.reduce_sum(sums * g.exp(top - largest));
  if (g.first()) {
    const int64_t label = a.labels[row];
    a.top[row] = sum == 0 ? -kInfinity : largest;
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
