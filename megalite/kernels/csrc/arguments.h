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
  int64_t rows() const { return size[0] * size[1] * size[2]; }
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

// Softmax over columns of scale * x; a column is visible when the mask is not 0 and, if causal, it is not after query
// k.
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

// gelu(x + bias), the tanh form, and the gradient of its argument.
struct BiasGelu {
  Shape shape;
  Type type;
  const void *x, *bias, *grad;  // bias [columns] or null; grad in the backward
  void* out;
};

// silu(gate) * up of rows x [2 * columns], gate first, and the gradient of x.
struct SwiGlu {
  Shape shape;
  Type type;
  const void *x, *grad;
  void* out;
};

// y = weight * s / sqrt(mean(s^2) + epsilon), s = x + residual. Rows are taken in groups of `group`, each by one lane
// group, which sums its part of the weight's gradient.
struct RmsNorm {
  Shape shape;  // size[0] groups, size[1] = size[2] = 1
  Type type;
  int64_t rows, group;
  float epsilon;
  const void *x, *residual, *weight;  // backward: x is s
  const void *grad, *grad_sum;        // backward: of y; of s or null
  void *out, *sum;                    // forward: y, and s where there is a residual; backward: the gradient of x
  float *scale, *grad_weight;         // 1 / sqrt(...) [rows]; parts of the weight's gradient [groups, columns]
};

// The two halves (a, b) of a row turned by the angles of a table: a cos - b sin, b cos + a sin; `inverse` turns back.
struct Rotary {
  Shape shape;
  Type type;
  int32_t inverse;
  PerRow<void> x, cos, sin;  // of the type
  void* out;
};

// Cross-entropy over a part of the vocabulary, the first `valid` columns: largest logit, sum of exp(logit - largest)
// and the label's logit (0 if it is not here); backward: gradients (softmax - [label]) * grad over the logits.
struct CrossEntropy {
  Shape shape;
  Type type;
  int64_t valid;
  void* logits;
  const int64_t* labels;  // columns; others lie elsewhere
  float *top, *sum, *target;
  const float *lse, *grad;
};

// All kernels and their arguments.
#define MEGALITE_KERNELS(X)                \
  X(softmax_forward, Softmax)              \
  X(softmax_backward, Softmax)             \
  X(bias_dropout_add, BiasDropoutAdd)      \
  X(bias_gelu_forward, BiasGelu)           \
  X(bias_gelu_backward, BiasGelu)          \
  X(swiglu_forward, SwiGlu)                \
  X(swiglu_backward, SwiGlu)               \
  X(rms_norm_forward, RmsNorm)             \
  X(rms_norm_backward, RmsNorm)            \
  X(rotary, Rotary)                        \
  X(cross_entropy_forward, CrossEntropy)   \
  X(cross_entropy_backward, CrossEntropy)

}  // namespace megalite
