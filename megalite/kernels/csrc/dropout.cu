// residual + dropout(x + bias) on a GPU: a block per row.
#include "cuda.cuh"

namespace megalite {
namespace {

template <class T>
struct Add {
  using Arguments = BiasDropoutAdd;
  template <class L>
  static __device__ __forceinline__ void run(const L& g, const BiasDropoutAdd& a, int64_t row) {
    bias_dropout_add<T>(g, a, row);
  }
};

}  // namespace
}  // namespace megalite

using namespace megalite;

MEGALITE_EXPORT int megalite_bias_dropout_add_cuda(const BiasDropoutAdd& a, void* stream) {
  return by_type(a.type, [&](auto zero) {
    return launch_blocks<Add<decltype(zero)>>(a, static_cast<cudaStream_t>(stream));
  });
}
