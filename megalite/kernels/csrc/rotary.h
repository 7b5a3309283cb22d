// Rotary position embedding (Su et al. 2021) of a head, whose two halves are the coordinates that are turned.
#pragma once
#include "rows.h"

namespace megalite {

template <class T>
ROW_FN const T* typed(const PerRow<void>& value, const Shape& shape, int64_t row) {
  const PerRow<T> same{static_cast<const T*>(value.data), {value.stride[0], value.stride[1], value.stride[2]}};
  return at(same, shape, row);
}

template <class T, class L>
ROW_FN void rotary(const L& g, const Rotary& a, int64_t row) {
  const int half = static_cast<int>(a.shape.columns / 2);
  const T* x = typed<T>(a.x, a.shape, row);
  const T *cos = typed<T>(a.cos, a.shape, row), *sin = typed<T>(a.sin, a.shape, row);
  T* y = static_cast<T*>(a.out) + 2 * row * half;
  const float sign = a.inverse ? -1.f : 1.f;
  each(g, half, [&](const auto& g, int k) {
    const int c = g.column(k);
    const auto first = g.load(x, c, half, half), second = g.load(x + half, c, half, half);
    const auto turn = g.load(cos, c, half, half), rise = sign * g.load(sin, c, half, half);
    g.store(y, c, half, first * turn - second * rise);
    g.store(y + half, c, half, second * turn + first * rise);
  });
}

}  // namespace megalite
