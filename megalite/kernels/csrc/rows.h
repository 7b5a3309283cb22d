// The row algorithms, written once for every target.
//
// A lane group L works on one row: the lanes of a SIMD register on a CPU, a warp or the warps of a block on a GPU. In
// step k it holds the kWidth neighbouring columns from g.column(k) on, one in each lane: a V (float or a vector of
// floats), a mask M, a word U of random bits. Reductions give every lane the same float.
//
// A group may have room for values between passes over the row: for what it read (kKeepsInputs: registers of a warp)
// and for what it computed (kKeepsResults: those, or a CPU's scratch row, which stays in cache). Otherwise it reads and
// computes them again, so that rows may be of any length. On a CPU, g.inner() (kHasInner) is the group for steps that lie
// inside of the row: it never looks for the end, so that the loop over them is short. will_read and will_write tell the
// processor's cache what comes.
#pragma once
#include "arguments.h"

#if defined(__CUDACC__) || defined(MEGALITE_EMULATION)
#define ROW_FN __device__ __forceinline__
#define ROW_APART ROW_FN
#else
#define ROW_FN inline __attribute__((always_inline))
#define ROW_APART __attribute__((noinline))  // so that it has all registers for itself
#endif
#ifdef __CUDACC__
#define ROW_UNROLL _Pragma("unroll")
#else
#define ROW_UNROLL
#endif

namespace megalite {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLowest = -0x1.fffffep127f;  // of the finite numbers
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

// f(g, k) for every step of the row.
template <class L, class F>
ROW_FN void each(const L& g, int columns, F f) {
  int k = 0;
  if constexpr (L::kHasInner)
    for (; k < columns / L::kWidth; ++k) f(g.inner(), k);
  ROW_UNROLL
  for (; k < g.steps(columns); ++k) f(g, k);
}

// f(g, k) for every kSteps-th step, for f to do so many; those beyond the end of the row see nothing of it.
template <int kSteps, class L, class F>
ROW_FN void by_steps(const L& g, int columns, F f) {
  int k = 0;
  if constexpr (L::kHasInner)
    for (; k + kSteps <= columns / L::kWidth; k += kSteps) f(g.inner(), k);
  ROW_UNROLL
  for (; k < g.steps(columns); k += kSteps) f(g, k);
}

// f(g, k, kept) for the steps of a block of 256 columns: which elements dropout keeps. 64 columns on, the same counter's
// next word decides.
template <class L, class F>
ROW_FN void each_of_block(const L& g, int first, int steps, const Dropout& dropout, const Counter& counter, F f) {
  constexpr int kSlots = kPlane / L::kWidth;
  typename L::U words[kSlots][4];
  ROW_UNROLL
  for (int slot = 0; slot < kSlots; ++slot)
    if (first + slot < steps) g.random(words[slot], g.column(first) / 4 + slot * L::kWidth, counter, dropout.key);
  ROW_UNROLL
  for (int w = 0; w < 4; ++w) {  // all words first, so that memory is read in order
    ROW_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      const int k = first + w * kSlots + slot;
      if (k < steps) f(g, k, words[slot][w] > dropout.limit);
    }
  }
}

template <class L, class F>
ROW_FN void each_with_dropout(const L& g, int columns, const Dropout& dropout, const Counter& counter, F f) {
  constexpr int kSteps = kBlock / L::kWidth;
  int first = 0;
  if constexpr (L::kHasInner)
    for (; first + kSteps <= columns / L::kWidth; first += kSteps)
      each_of_block(g.inner(), first, first + kSteps, dropout, counter, f);
  ROW_UNROLL
  for (; first < g.steps(columns); first += kSteps) each_of_block(g, first, g.steps(columns), dropout, counter, f);
}

template <bool kDropout, class L, class F>
ROW_FN void each_element(const L& g, int columns, const Dropout& dropout, const Counter& counter, F f) {
  if constexpr (kDropout) each_with_dropout(g, columns, dropout, counter, f);
  else each(g, columns, [&](const auto& g, int k) { f(g, k, true); });
}

template <bool kKept, class L, class F>
ROW_FN typename L::V kept_or(const L& g, int slot, int k, F again) {
  if constexpr (kKept) return g.kept(slot, k);
  else return again();
}

}  // namespace megalite
