// residual + dropout(x + bias) of a row.
#pragma once
#include "rows.h"

namespace megalite {

template <class L, class T>
ROW_FN void bias_dropout_add_row(const L& g, const BiasDropoutAdd& a, const T* x, const T* bias, const T* residual,
                                 T* y, const Counter& counter) {
  const int columns = static_cast<int>(a.shape.columns);
  each_with_dropout(g, columns, a.dropout, counter, [&](const auto& g, int k, auto kept) {
    const int c = g.column(k);
    auto v = g.load(x, c, columns, columns);
    if (bias) v = v + g.load(bias, c, columns, columns);
    v = g.select(kept, v * a.dropout.factor, 0.f);
    if (residual) v = v + g.load(residual, c, columns, columns);
    g.store(y, c, columns, v);
  });
}

template <class T, class L>
ROW_FN void bias_dropout_add(const L& g, const BiasDropoutAdd& a, int64_t row) {
  const int64_t start = row * a.shape.columns;
  const T* residual = static_cast<const T*>(a.residual);
  bias_dropout_add_row(g, a, static_cast<const T*>(a.x) + start, static_cast<const T*>(a.bias),
                       residual ? residual + start : nullptr, static_cast<T*>(a.out) + start,
                       counter_of(a.dropout, a.shape, row));
}

}  // namespace megalite
