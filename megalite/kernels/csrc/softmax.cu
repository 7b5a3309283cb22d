// Softmax of attention scores on a GPU: a warp per row up to 1024 columns, a block per row above.
#include "cuda.cuh"  // first: it says what the others are compiled for

#include "softmax.h"

namespace megalite {
namespace {

template <bool kDropout, class T>
struct Forward {
  using Arguments = Softmax;
  template <class L>
  static __device__ __forceinline__ void run(const L& g, const Softmax& a, int64_t row) {
    softmax_forward<kDropout, T>(g, a, row);
  }
};

template <bool kDropout, class T>
struct Backward {
  using Arguments = Softmax;
  template <class L>
  static __device__ __forceinline__ void run(const L& g, const Softmax& a, int64_t row) {
    softmax_backward<kDropout, T>(g, a, row);
  }
};

}  // namespace
}  // namespace megalite

using namespace megalite;

MEGALITE_EXPORT int megalite_softmax_forward_cuda(const Softmax& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return by_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    return a.dropout.rows.data ? launch_rows<Forward<true, T>>(a, s) : launch_rows<Forward<false, T>>(a, s);
  });
}

MEGALITE_EXPORT int megalite_softmax_backward_cuda(const Softmax& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return by_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    return a.dropout.rows.data ? launch_rows<Backward<true, T>>(a, s) : launch_rows<Backward<false, T>>(a, s);
  });
}
