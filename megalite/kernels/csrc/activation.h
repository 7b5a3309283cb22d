// GELU (Hendrycks and Gimpel 2016, the tanh form) with a bias, and SwiGLU (Shazeer 2020).
//
// (1 + tanh z) / 2 = sigmoid(2 z), so the tanh form is x * sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3).
#pragma once
#include "rows.h"

namespace megalite {

template <class L>
ROW_FN typename L::V sigmoid(const L& g, typename L::V x) {
  return 1.f / (1.f + g.exp(-x));
}

constexpr float kTwice = 1.5957691216f;  // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

template <class T, class L>
ROW_FN typename L::V gelu_argument(const L& g, const BiasGelu& a, int64_t start, int c, int columns) {
  auto v = g.load(static_cast<const T*>(a.x) + start, c, columns, columns);
  if (a.bias) v = v + g.load(static_cast<const T*>(a.bias), c, columns, columns);
  return v;
}

template <class T, class L>
ROW_FN void bias_gelu_forward(const L& g, const BiasGelu& a, int64_t row) {
  const int columns = static_cast<int>(a.shape.columns);
  const int64_t start = row * columns;
  each(g, columns, [&](const auto& g, int k) {
    const int c = g.column(k);
    const auto v = gelu_argument<T>(g, a, start, c, columns);
    g.store(static_cast<T*>(a.out) + start, c, columns, v * sigmoid(g, kTwice * (v + kCubic * v * v * v)));
  });
}

template <class T, class L>
ROW_FN void bias_gelu_backward(const L& g, const BiasGelu& a, int64_t row) {
  const int columns = static_cast<int>(a.shape.columns);
  const int64_t start = row * columns;
  each(g, columns, [&](const auto& g, int k) {
    const int c = g.column(k);
    const auto v = gelu_argument<T>(g, a, start, c, columns);
    const auto s = sigmoid(g, kTwice * (v + kCubic * v * v * v));
    const auto slope = s + v * s * (1.f - s) * (kTwice * (1.f + 3 * kCubic * v * v));
    g.store(static_cast<T*>(a.out) + start, c, columns,
            slope * g.load(static_cast<const T*>(a.grad) + start, c, columns, columns));
  });
}

template <class T, class L>
ROW_FN void swiglu_forward(const L& g, const SwiGlu& a, int64_t row) {
  const int columns = static_cast<int>(a.shape.columns);
  const T* x = static_cast<const T*>(a.x) + 2 * row * columns;
  each(g, columns, [&](const auto& g, int k) {
    const int c = g.column(k);
    const auto gate = g.load(x, c, columns, columns), up = g.load(x + columns, c, columns, columns);
    g.store(static_cast<T*>(a.out) + row * columns, c, columns, gate * sigmoid(g, gate) * up);
  });
}

template <class T, class L>
ROW_FN void swiglu_backward(const L& g, const SwiGlu& a, int64_t row) {
  const int columns = static_cast<int>(a.shape.columns);
  const T* x = static_cast<const T*>(a.x) + 2 * row * columns;
  T* dx = static_cast<T*>(a.out) + 2 * row * columns;
  each(g, columns, [&](const auto& g, int k) {
    const int c = g.column(k);
    const auto gate = g.load(x, c, columns, columns), up = g.load(x + columns, c, columns, columns);
    const auto d = g.load(static_cast<const T*>(a.grad) + row * columns, c, columns, columns);
    const auto s = sigmoid(g, gate);
    g.store(dx, c, columns, d * up * s * (1.f + gate * (1.f - s)));
    g.store(dx + columns, c, columns, d * gate * s);
  });
}

}  // namespace megalite
