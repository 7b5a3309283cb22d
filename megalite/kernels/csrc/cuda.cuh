// Lane groups of a GPU, and how kernels are started on them.
//
// The .cu files include CUDA's headers and ours only. They export launchers, which take arguments and a stream and
// return a cudaError_t. tests/kernels/emulation.h stands in for <<<...>>> and the warp's functions where a C++ compiler
// builds them for a CPU.
#pragma once
#ifdef MEGALITE_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>
#define MEGALITE_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "rows.h"

namespace megalite {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void assign(float& to, float v) { to = v; }
__device__ __forceinline__ void assign(__half& to, float v) { to = __float2half_rn(v); }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }

// What all groups share: this thread is one lane, `lane` columns after the first of its warp.
struct GpuLanes {
  using V = float;
  using U = uint32_t;
  static constexpr int kWidth = kWarp;
  static constexpr bool kHasInner = false;
  int lane;

  __device__ __forceinline__ float splat(float f) const { return f; }
  __device__ __forceinline__ float select(bool m, float a, float b) const { return m ? a : b; }
  __device__ __forceinline__ float max(float a, float b) const { return a > b ? a : b; }
  __device__ __forceinline__ float exp(float x) const { return expf(x); }
  __device__ __forceinline__ float log(float x) const { return logf(x); }
  __device__ __forceinline__ float sqrt(float x) const { return sqrtf(x); }
  template <class T>
  __device__ __forceinline__ float value(T x) const {
    return to_float(x);
  }
  __device__ __forceinline__ float one_at(int at) const { return at == lane ? 1.f : 0.f; }

  __device__ __forceinline__ float inside(int c, int columns, float v, float otherwise) const {
    return c + lane < columns ? v : otherwise;
  }
  template <class T>
  __device__ __forceinline__ float load(const T* p, int c, int visible, int) const {
    return c + lane < visible ? to_float(p[c + lane]) : 0.f;
  }
  __device__ __forceinline__ bool load_mask(const uint8_t* p, int c, int visible, int) const {
    return c + lane < visible && p[c + lane] != 0;
  }
  __device__ __forceinline__ void will_read(const void*) const {}
  __device__ __forceinline__ void will_write(const void*) const {}
  template <class T>
  __device__ __forceinline__ void store(T* p, int c, int columns, float v) const {
    if (c + lane < columns) assign(p[c + lane], v);
  }

  __device__ static __forceinline__ uint64_t multiply(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
  __device__ static __forceinline__ uint32_t high(uint64_t p) { return static_cast<uint32_t>(p >> 32); }
  __device__ static __forceinline__ uint32_t low(uint64_t p) { return static_cast<uint32_t>(p); }
  __device__ __forceinline__ void random(U (&words)[4], int start, const Counter& counter,
                                         const uint32_t (&key)[2]) const {
    words[0] = static_cast<uint32_t>(start + lane);
    for (int w = 1; w < 4; ++w) words[w] = counter.word[w - 1];
    philox<GpuLanes>(words, key[0], key[1]);
  }

  template <class F>
  __device__ __forceinline__ float reduce_warp(float v, F combine) const {
    ROW_UNROLL
    for (int distance = kWarp / 2; distance; distance /= 2) v = combine(v, __shfl_xor_sync(kAllLanes, v, distance));
    return v;
  }
};

struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b ? a : b; }
};
struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// A warp that holds a whole row in registers: up to 32 * kSteps columns.
template <int kSteps>
struct WarpLanes : GpuLanes {
  static constexpr bool kKeepsInputs = true, kKeepsResults = true;
  float (&held)[2][kSteps];

  __device__ __forceinline__ WarpLanes(int lane, float (&held)[2][kSteps]) : GpuLanes{lane}, held(held) {}
  __device__ __forceinline__ constexpr int steps(int) const { return kSteps; }
  __device__ __forceinline__ int column(int k) const { return k * kWarp; }
  __device__ __forceinline__ bool first() const { return lane == 0; }
  __device__ __forceinline__ void keep(int slot, int k, float v) const { held[slot][k] = v; }
  __device__ __forceinline__ float kept(int slot, int k) const { return held[slot][k]; }
  template <class T>
  __device__ __forceinline__ void fill(T*, int, int, float) const {}  // the steps reach all columns
  __device__ __forceinline__ float reduce_max(float v) const { return reduce_warp(v, Larger()); }
  __device__ __forceinline__ float reduce_sum(float v) const { return reduce_warp(v, Sum()); }
};

// The warps of a block, for rows of any length: in turn, each takes the next 256 columns. `shared` has room for a float
// of each warp.
struct BlockLanes : GpuLanes {
  static constexpr bool kKeepsInputs = false, kKeepsResults = false;
  static constexpr int kSteps = kBlock / kWarp;
  int warp, warps;
  float* shared;

  __device__ __forceinline__ BlockLanes(int thread, int threads, float* shared)
      : GpuLanes{thread % kWarp}, warp(thread / kWarp), warps(threads / kWarp), shared(shared) {}
  __device__ __forceinline__ int steps(int columns) const {
    return (columns + kBlock * warps - 1) / (kBlock * warps) * kSteps;
  }
  __device__ __forceinline__ int column(int k) const {
    return (k / kSteps * warps + warp) * kBlock + k % kSteps * kWarp;
  }
  __device__ __forceinline__ bool first() const { return lane == 0 && warp == 0; }
  template <class T>
  __device__ __forceinline__ void fill(T* p, int done, int columns, float value) const {
    for (int c = steps(done) * warps * kWarp + warp * kWarp; c < columns; c += warps * kWarp)
      store(p, c, columns, value);
  }
  template <class F>
  __device__ __forceinline__ float reduce(float v, F combine) const {
    v = reduce_warp(v, combine);
    if (lane == 0) shared[warp] = v;
    __syncthreads();
    v = shared[0];
    for (int w = 1; w < warps; ++w) v = combine(v, shared[w]);
    __syncthreads();  // before the next reduction writes there
    return v;
  }
  __device__ __forceinline__ float reduce_max(float v) const { return reduce(v, Larger()); }
  __device__ __forceinline__ float reduce_sum(float v) const { return reduce(v, Sum()); }
};

// Kernels run an operation: a class with Arguments and a function run(lanes, arguments, row).

constexpr int kRowsPerBlock = 4, kWarpsPerRow = 8;

template <class Operation, int kSteps>
__global__ void __launch_bounds__(kRowsPerBlock* kWarp)
    warp_per_row(const typename Operation::Arguments a, const int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= rows) return;  // a whole warp
  float held[2][kSteps];
  Operation::run(WarpLanes<kSteps>(static_cast<int>(threadIdx.x), held), a, row);
}

template <class Operation>
__global__ void __launch_bounds__(kWarpsPerRow* kWarp) block_per_row(const typename Operation::Arguments a) {
  __shared__ float shared[kWarpsPerRow];
  Operation::run(BlockLanes(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), shared), a,
                 static_cast<int64_t>(blockIdx.x));
}

inline bool fits_a_grid(const Shape& s) {
  return s.rows() < (1ll << 31) && s.columns < (1ll << 31) - kBlock * kWarpsPerRow;
}

template <class Operation>
cudaError_t launch_blocks(const typename Operation::Arguments& a, cudaStream_t stream) {
  if (!fits_a_grid(a.shape)) return cudaErrorInvalidConfiguration;
  const int64_t needed = (a.shape.columns + kBlock - 1) / kBlock;
  const unsigned warps = static_cast<unsigned>(needed < kWarpsPerRow ? needed : kWarpsPerRow);
  const dim3 grid(static_cast<unsigned>(a.shape.rows())), block(warps * kWarp);
  MEGALITE_LAUNCH((block_per_row<Operation>), grid, block, stream, a);
  return cudaGetLastError();
}

// The smallest power of two of steps that holds the row, up to kMost; longer rows take a block each.
template <class Operation, int kSteps = 2, int kMost = 32>
cudaError_t launch_rows(const typename Operation::Arguments& a, cudaStream_t stream) {
  if (!fits_a_grid(a.shape)) return cudaErrorInvalidConfiguration;
  if (a.shape.columns > kSteps * kWarp) {
    if constexpr (kSteps < kMost) return launch_rows<Operation, 2 * kSteps, kMost>(a, stream);
    else return launch_blocks<Operation>(a, stream);
  }
  const int64_t rows = a.shape.rows();
  const dim3 grid(static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock)), block(kWarp, kRowsPerBlock);
  MEGALITE_LAUNCH((warp_per_row<Operation, kSteps>), grid, block, stream, a, rows);
  return cudaGetLastError();
}

// For rows of up to some 100 columns: a warp each, several in a block.
template <class Operation>
cudaError_t launch_short_rows(const typename Operation::Arguments& a, cudaStream_t stream) {
  return launch_rows<Operation, 2, 8>(a, stream);
}

// launch(zero of the C++ type) for a type known at run time
template <class F>
int by_type(Type type, F launch) {
  switch (type) {
    case Type::kFloat: return launch(float());
    case Type::kHalf: return launch(__half());
    case Type::kBFloat16: return launch(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

}  // namespace megalite

#define MEGALITE_EXPORT extern "C" __attribute__((visibility("default")))

// A kernel of MEGALITE_KERNELS as an operation and its launcher; `launch` is one of the launch_... above.
#define MEGALITE_DEFINE_CUDA(kernel, Args, launch)                                              \
  namespace {                                                                                   \
  template <class T>                                                                            \
  struct kernel##_operation {                                                                   \
    using Arguments = megalite::Args;                                                           \
    template <class L>                                                                          \
    static __device__ __forceinline__ void run(const L& g, const Arguments& a, int64_t row) {   \
      megalite::kernel<T>(g, a, row);                                                           \
    }                                                                                           \
  };                                                                                            \
  }                                                                                             \
  MEGALITE_EXPORT int megalite_##kernel##_cuda(const megalite::Args& a, void* stream) {         \
    return megalite::by_type(a.type, [&](auto zero) {                                           \
      return megalite::launch<kernel##_operation<decltype(zero)>>(a, static_cast<cudaStream_t>(stream)); \
    });                                                                                         \
  }
