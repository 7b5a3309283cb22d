// Registers the kernels as operators megalite::_... over torch's stable ABI: one build serves all Pythons and later
// versions of torch. They are the native bodies of the operators that the Python modules beside this folder define, which
// check what they are given, allocate the outputs, and view tensors as [i, j, k, columns] (arguments.h).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "arguments.h"

#ifdef MEGALITE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

using megalite::BiasDropoutAdd;
using megalite::Softmax;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

#define DECLARE_CPU(target)                                                                          \
  void megalite_softmax_forward_##target(const Softmax&, int64_t begin, int64_t end, float* scratch);  \
  void megalite_softmax_backward_##target(const Softmax&, int64_t begin, int64_t end, float* scratch); \
  void megalite_bias_dropout_add_##target(const BiasDropoutAdd&, int64_t begin, int64_t end, float* scratch);

extern "C" {
DECLARE_CPU(baseline)
#ifdef __x86_64__
DECLARE_CPU(avx2)
DECLARE_CPU(avx512)
#endif
#ifdef MEGALITE_CUDA
int megalite_softmax_forward_cuda(const Softmax&, void* stream);
int megalite_softmax_backward_cuda(const Softmax&, void* stream);
int megalite_bias_dropout_add_cuda(const BiasDropoutAdd&, void* stream);
#endif
}

namespace {

// Arguments from tensors

template <class T>
megalite::PerRow<T> per_row(const MaybeTensor& t) {
  if (!t) return {};
  return {static_cast<const T*>(t->const_data_ptr()), {t->stride(0), t->stride(1), t->stride(2)}};
}

megalite::Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), "megalite's kernels take contiguous [i, j, k, columns]");
  return {{x.size(0), x.size(1), x.size(2)}, x.size(3)};
}

megalite::Type type_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "megalite's kernels take float32, float16 and bfloat16");
  return type == ScalarType::Float  ? megalite::Type::kFloat
         : type == ScalarType::Half ? megalite::Type::kHalf
                                    : megalite::Type::kBFloat16;
}

const void* data(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

megalite::Dropout dropout_of(const MaybeTensor& rows, const MaybeTensor& samples, int64_t place, int64_t key0,
                             int64_t key1, int64_t limit, double factor) {
  return {per_row<int64_t>(rows), per_row<int64_t>(samples), static_cast<uint32_t>(place),
          {static_cast<uint32_t>(key0), static_cast<uint32_t>(key1)}, static_cast<uint32_t>(limit),
          static_cast<float>(factor)};
}

// The CPU

struct Cpu {
  int64_t lanes;
  void (*softmax_forward)(const Softmax&, int64_t, int64_t, float*);
  void (*softmax_backward)(const Softmax&, int64_t, int64_t, float*);
  void (*bias_dropout_add)(const BiasDropoutAdd&, int64_t, int64_t, float*);
};

#define CPU_KERNELS(target) \
  megalite_softmax_forward_##target, megalite_softmax_backward_##target, megalite_bias_dropout_add_##target

const Cpu& cpu() {
  static const Cpu best = [] {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return Cpu{16, CPU_KERNELS(avx512)};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Cpu{8, CPU_KERNELS(avx2)};
#endif
    return Cpu{4, CPU_KERNELS(baseline)};
  }();
  return best;
}

int64_t cpu_lanes() { return cpu().lanes; }

constexpr int64_t kElementsPerTask = 1 << 15;  // below some 10 us, threads are not worth waking

template <class A>
void on_cpu(void (*kernel)(const A&, int64_t, int64_t, float*), const A& a) {
  const auto& s = a.shape;
  const int64_t grain = 1 + kElementsPerTask / (s.columns + 1);
  torch::stable::parallel_for(0, s.size[0] * s.size[1] * s.size[2], grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * (s.columns + 64));  // two rows, each rounded up to whole registers
    kernel(a, begin, end, scratch.data());
  });
}

struct OnCpu {
  static void softmax_forward(const Tensor&, const Softmax& a) { on_cpu(cpu().softmax_forward, a); }
  static void softmax_backward(const Tensor&, const Softmax& a) { on_cpu(cpu().softmax_backward, a); }
  static void bias_dropout_add(const Tensor&, const BiasDropoutAdd& a) { on_cpu(cpu().bias_dropout_add, a); }
};

// CUDA

#ifdef MEGALITE_CUDA
template <class A>
void on_cuda(int (*launch)(const A&, void*), const Tensor& x, const A& a) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const int error = launch(a, stream);
  STD_TORCH_CHECK(error == 0, "a kernel of megalite could not be started: CUDA error ", error);
}

struct OnCuda {
  static void softmax_forward(const Tensor& x, const Softmax& a) { on_cuda(megalite_softmax_forward_cuda, x, a); }
  static void softmax_backward(const Tensor& x, const Softmax& a) { on_cuda(megalite_softmax_backward_cuda, x, a); }
  static void bias_dropout_add(const Tensor& x, const BiasDropoutAdd& a) {
    on_cuda(megalite_bias_dropout_add_cuda, x, a);
  }
};
#endif

// The operators

template <class Device>
void softmax_forward(const Tensor& x, const MaybeTensor& mask, bool causal, double scale, const MaybeTensor& rows,
                     const MaybeTensor& samples, int64_t place, int64_t key0, int64_t key1, int64_t limit,
                     double factor, Tensor out, Tensor lse) {
  Device::softmax_forward(
      x, {shape_of(x), type_of(x), causal, static_cast<float>(scale), per_row<uint8_t>(mask),
          dropout_of(rows, samples, place, key0, key1, limit, factor), x.const_data_ptr(), nullptr, nullptr,
          out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr())});
}

template <class Device>
void softmax_backward(const Tensor& grad, const MaybeTensor& x, const MaybeTensor& y, const MaybeTensor& mask,
                      bool causal, double scale, const MaybeTensor& rows, const MaybeTensor& samples, int64_t place,
                      int64_t key0, int64_t key1, int64_t limit, double factor, Tensor out, Tensor lse) {
  Device::softmax_backward(
      grad, {shape_of(grad), type_of(grad), causal, static_cast<float>(scale), per_row<uint8_t>(mask),
             dropout_of(rows, samples, place, key0, key1, limit, factor), data(x), grad.const_data_ptr(), data(y),
             out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr())});
}

template <class Device>
void bias_dropout_add(const Tensor& x, const MaybeTensor& bias, const MaybeTensor& residual, const Tensor& rows,
                      const Tensor& samples, int64_t place, int64_t key0, int64_t key1, int64_t limit, double factor,
                      Tensor out) {
  Device::bias_dropout_add(x, {shape_of(x), type_of(x), dropout_of(rows, samples, place, key0, key1, limit, factor),
                               x.const_data_ptr(), data(bias), data(residual), out.mutable_data_ptr()});
}

}  // namespace

#define DROPOUT "int place, int key0, int key1, int limit, float factor"

STABLE_TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("_cpu_lanes() -> int");
  m.def("_softmax_forward(Tensor x, Tensor? mask, bool causal, float scale, Tensor? rows, Tensor? samples, " DROPOUT
        ", Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("_softmax_backward(Tensor grad, Tensor? x, Tensor? y, Tensor? mask, bool causal, float scale, Tensor? rows, "
        "Tensor? samples, " DROPOUT ", Tensor(a!) out, Tensor lse) -> ()");
  m.def("_bias_dropout_add(Tensor x, Tensor? bias, Tensor? residual, Tensor rows, Tensor samples, " DROPOUT
        ", Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megalite, CompositeExplicitAutograd, m) { m.impl("_cpu_lanes", TORCH_BOX(&cpu_lanes)); }

#define IMPLEMENT(Device)                                              \
  m.impl("_softmax_forward", TORCH_BOX(&softmax_forward<Device>));     \
  m.impl("_softmax_backward", TORCH_BOX(&softmax_backward<Device>));   \
  m.impl("_bias_dropout_add", TORCH_BOX(&bias_dropout_add<Device>));

STABLE_TORCH_LIBRARY_IMPL(megalite, CPU, m) { IMPLEMENT(OnCpu) }
#ifdef MEGALITE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megalite, CUDA, m) { IMPLEMENT(OnCuda) }
#endif
