// What a kernel is told: plain structs, the same for the CPU, CUDA and the tests, which fill them by ctypes.
//
// A tensor is rows of `columns` neighbouring elements. Rows have three numbers (i, j, k), k fastest: batch, head and
// query of attention scores [b, n, s_q, s_k]; 0, position and batch of hidden states [s, b, h].
#pragma once
#include <cstdint>

namespace megalite {

enum class Type : int32_t { kFloat = 0, kHalf = 1, kBFloat16 = 2 };

struct Shape {
  int64_t size[3];
  int64_t columns;
};

// Something that rows have, and where row (i, j, k) finds it: strides in elements, 0 where it is broadcast.
template <class T>
struct PerRow {
  const T* data;  // or null: there is none
  int64_t stride[3];
};

// Dropout by counters (docs/randomness.md): an element is kept when its Philox word is above `limit`.
struct Dropout {
  PerRow<int64_t> rows, samples;  // null: no dropout
  uint32_t place, key[2], limit;
  float factor;  // 1 / (1 - p)
};

// Softmax over columns of scale * x; a column is visible when the mask is not 0 and, if causal, it is not after query k.
struct Softmax {
  Shape shape;
  Type type;
  int32_t causal;
  float scale;
  PerRow<uint8_t> mask;
  Dropout dropout;
  const void* x;     // scores. The backward needs them with dropout only
  const void* grad;  // backward: gradient of the output
  const void* y;     // backward without dropout: the output
  void* out;         // forward: the output; backward: the gradient of x
  float* lse;        // logarithm of the sum of exp over visible columns: +inf without any, NaN where the output is
};

// out = residual + dropout(x + bias)
struct BiasDropoutAdd {
  Shape shape;
  Type type;
  Dropout dropout;
  const void *x, *bias, *residual;  // bias [columns]; bias and residual may be null
  void* out;
};

}  // namespace megalite
