// The row algorithms, written once for every target.
//
// A lane group L works on one row: the lanes of a SIMD register on a CPU, a warp or the warps of a block on a GPU. In
// step k it holds the kWidth neighbouring columns from g.column(k) on, one in each lane: a V (float or a vector of
// floats), a mask M, a word U of random bits. Reductions give every lane the same float.
//
// A group may have room for values between passes over the row: for what it read (kKeepsInputs: registers of a warp)
// and for what it computed (kKeepsResults: those, or a CPU's scratch row, which stays in cache). Otherwise it reads and
// computes them again, so that rows may be of any length.
#pragma once
#include "arguments.h"

#if defined(__CUDACC__) || defined(MEGALITE_EMULATION)
#define ROW_FN __device__ __forceinline__
#else
#define ROW_FN inline __attribute__((always_inline))
#endif
#ifdef __CUDACC__
#define ROW_UNROLL _Pragma("unroll")
#else
#define ROW_UNROLL
#endif

namespace megalite {

constexpr float kInfinity = __builtin_huge_valf();
constexpr int kPlane = 64;  // neighbouring columns that use the same word of neighbouring counters
constexpr int kBlock = 4 * kPlane;

template <class T>
ROW_FN const T* at(const PerRow<T>& value, const Shape& shape, int64_t row) {
  if (!value.data) return nullptr;
  const int64_t k = row % shape.size[2], ij = row / shape.size[2];
  return value.data + (ij / shape.size[1]) * value.stride[0] + (ij % shape.size[1]) * value.stride[1] +
         k * value.stride[2];
}

// Counter words 1 to 3 of a row.
struct Counter {
  uint32_t word[3];
};

ROW_FN Counter counter_of(const Dropout& dropout, const Shape& shape, int64_t row) {
  if (!dropout.rows.data) return {};
  const auto sample = static_cast<uint64_t>(*at(dropout.samples, shape, row));
  return {{static_cast<uint32_t>(*at(dropout.rows, shape, row)), static_cast<uint32_t>(sample),
           static_cast<uint32_t>(sample >> 32) + (dropout.place << 16)}};
}

// Philox 4x32-10 (Salmon et al. 2011) in place. L::multiply gives products of 64 bits, L::high and L::low their halves.
template <class L, class Word>
ROW_FN void philox(Word (&x)[4], uint32_t key0, uint32_t key1) {
  ROW_UNROLL
  for (int round = 0; round < 10; ++round) {
    const auto p = L::multiply(x[0], 0xD2511F53u), q = L::multiply(x[2], 0xCD9E8D57u);
    x[0] = L::high(q) ^ x[1] ^ key0;
    x[1] = L::low(q);
    x[2] = L::high(p) ^ x[3] ^ key1;
    x[3] = L::low(p);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// f(k) for every step of the row.
template <class L, class F>
ROW_FN void each(const L& g, int columns, F f) {
  ROW_UNROLL
  for (int k = 0; k < g.steps(columns); ++k) f(k);
}

// f(k, kept) for every step: which elements dropout keeps. 64 columns on, the same counter's next word decides.
template <class L, class F>
ROW_FN void each_with_dropout(const L& g, int columns, const Dropout& dropout, const Counter& counter, F f) {
  constexpr int kSlots = kPlane / L::kWidth;
  ROW_UNROLL
  for (int first = 0; first < g.steps(columns); first += 4 * kSlots) {
    typename L::U words[kSlots][4];
    ROW_UNROLL
    for (int slot = 0; slot < kSlots; ++slot)
      if (first + slot < g.steps(columns))
        g.random(words[slot], g.column(first) / 4 + slot * L::kWidth, counter, dropout.key);
    ROW_UNROLL
    for (int w = 0; w < 4; ++w) {  // all words first, so that memory is read in order
      ROW_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) {
        const int k = first + w * kSlots + slot;
        if (k < g.steps(columns)) f(k, words[slot][w] > dropout.limit);
      }
    }
  }
}

template <bool kDropout, class L, class F>
ROW_FN void each_element(const L& g, int columns, const Dropout& dropout, const Counter& counter, F f) {
  if constexpr (kDropout) each_with_dropout(g, columns, dropout, counter, f);
  else each(g, columns, [&](int k) { f(k, true); });
}

template <bool kKept, class L, class F>
ROW_FN typename L::V kept_or(const L& g, int slot, int k, F again) {
  if constexpr (kKept) return g.kept(slot, k);
  else return again();
}

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
  const auto input = [&](int k) { return score(g, k, x, mask, visible, columns, a.scale); };
  auto top = g.splat(-kInfinity);
  each(g, visible, [&](int k) {
    const auto v = input(k);
    if constexpr (L::kKeepsInputs) g.keep(0, k, v);
    top = g.max(v, top);  // of a NaN and a number, the number: the NaN will reach the sum
  });
  float shift = g.reduce_max(top);
  if (shift == -kInfinity) shift = 0;
  const auto power = [&](int k) {
    return g.exp(kept_or<L::kKeepsInputs>(g, 0, k, [&] { return input(k); }) - shift);
  };
  auto sums = g.splat(0.f);
  each(g, visible, [&](int k) {
    const auto v = power(k);
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
  each_element<kDropout>(g, visible, a.dropout, counter, [&](int k, auto kept) {
    auto v = kept_or<L::kKeepsResults>(g, 0, k, [&] { return g.exp(input(k) - shift); }) * kept_factor;
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
  const auto load = [&](const T* p, int k) { return g.load(p, g.column(k), visible, columns); };
  auto sums = g.splat(0.f);
  each(g, visible, [&](int k) {
    const auto p = load(y, k), d = load(dy, k);
    if constexpr (L::kKeepsInputs) g.keep(0, k, p), g.keep(1, k, d);
    sums = sums + p * d;
  });
  const float sum = g.reduce_sum(sums);
  each(g, visible, [&](int k) {
    const auto p = kept_or<L::kKeepsInputs>(g, 0, k, [&] { return load(y, k); });
    const auto d = kept_or<L::kKeepsInputs>(g, 1, k, [&] { return load(dy, k); });
    g.store(dx, g.column(k), columns, p * (d - sum) * a.scale);
  });
  g.fill(dx, visible, columns, 0.f);
}

// The same with dropout, from the scores and lse: p = exp(scale * x - lse), d = dropout(dy).
template <class L, class T>
ROW_FN void softmax_dropout_backward_row(const L& g, const Softmax& a, const T* dy, const T* x, const uint8_t* mask,
                                         float lse, T* dx, int visible, const Counter& counter) {
  const int columns = static_cast<int>(a.shape.columns);
  const auto power = [&](int k) { return g.exp(score(g, k, x, mask, visible, columns, a.scale) - lse); };
  const auto dropped = [&](int k, auto kept) {
    return g.select(kept, g.load(dy, g.column(k), visible, columns) * a.dropout.factor, 0.f);
  };
  auto sums = g.splat(0.f);
  each_with_dropout(g, visible, a.dropout, counter, [&](int k, auto kept) {
    const auto p = power(k), d = dropped(k, kept);
    if constexpr (L::kKeepsResults) g.keep(0, k, p), g.keep(1, k, d);
    sums = sums + p * d;
  });
  const float sum = g.reduce_sum(sums);
  each_element<!L::kKeepsResults>(g, visible, a.dropout, counter, [&](int k, auto kept) {
    const auto p = kept_or<L::kKeepsResults>(g, 0, k, [&] { return power(k); });
    const auto d = kept_or<L::kKeepsResults>(g, 1, k, [&] { return dropped(k, kept); });
    g.store(dx, g.column(k), columns, p * (d - sum) * a.scale);
  });
  g.fill(dx, visible, columns, 0.f);
}

template <class L, class T>
ROW_FN void bias_dropout_add_row(const L& g, const BiasDropoutAdd& a, const T* x, const T* bias, const T* residual,
                                 T* y, const Counter& counter) {
  const int columns = static_cast<int>(a.shape.columns);
  each_with_dropout(g, columns, a.dropout, counter, [&](int k, auto kept) {
    const int c = g.column(k);
    auto v = g.load(x, c, columns, columns);
    if (bias) v = v + g.load(bias, c, columns, columns);
    v = g.select(kept, v * a.dropout.factor, 0.f);
    if (residual) v = v + g.load(residual, c, columns, columns);
    g.store(y, c, columns, v);
  });
}

// Row `row` of a tensor: what all targets do around the algorithms.

template <bool kDropout, class T, class L>
ROW_FN void softmax_forward(const L& g, const Softmax& a, int64_t row) {
  const int64_t columns = a.shape.columns, query = row % a.shape.size[2];
  const int visible = static_cast<int>(a.causal && query + 1 < columns ? query + 1 : columns);
  const float lse = softmax_forward_row<kDropout>(
      g, a, static_cast<const T*>(a.x) + row * columns, at(a.mask, a.shape, row), static_cast<T*>(a.out) + row * columns,
      visible, counter_of(a.dropout, a.shape, row));
  if (g.first()) a.lse[row] = lse;
}

template <bool kDropout, class T, class L>
ROW_FN void softmax_backward(const L& g, const Softmax& a, int64_t row) {
  const int64_t columns = a.shape.columns, query = row % a.shape.size[2];
  const int visible = static_cast<int>(a.causal && query + 1 < columns ? query + 1 : columns);
  const T* dy = static_cast<const T*>(a.grad) + row * columns;
  T* dx = static_cast<T*>(a.out) + row * columns;
  if constexpr (kDropout)
    softmax_dropout_backward_row(g, a, dy, static_cast<const T*>(a.x) + row * columns, at(a.mask, a.shape, row),
                                 a.lse[row], dx, visible, counter_of(a.dropout, a.shape, row));
  else softmax_backward_row(g, a, dy, static_cast<const T*>(a.y) + row * columns, dx, visible);
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
