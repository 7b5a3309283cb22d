// Registers the kernels as operators megalite::_... over torch's stable ABI: one build serves all Pythons and later
// versions of torch. They are the native bodies of the operators that the Python modules beside this folder define;
// these check what they are given, allocate the outputs, and view tensors as [i, j, k, columns] (arguments.h).
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

using namespace megalite;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// On a CPU: rows begin .. end - 1, with scratch memory.
#define DECLARE_BASELINE(kernel, A) void megalite_##kernel##_baseline(const A&, int64_t, int64_t, float*);
#define DECLARE_AVX2(kernel, A) void megalite_##kernel##_avx2(const A&, int64_t, int64_t, float*);
#define DECLARE_AVX512(kernel, A) void megalite_##kernel##_avx512(const A&, int64_t, int64_t, float*);
#define DECLARE_CUDA(kernel, A) int megalite_##kernel##_cuda(const A&, void* stream);

extern "C" {
MEGALITE_KERNELS(DECLARE_BASELINE)
#ifdef __x86_64__
MEGALITE_KERNELS(DECLARE_AVX2)
MEGALITE_KERNELS(DECLARE_AVX512)
#endif
#ifdef MEGALITE_CUDA
MEGALITE_KERNELS(DECLARE_CUDA)
#endif
}

namespace {

// Arguments from tensors

template <class T>
PerRow<T> per_row(const MaybeTensor& t) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() >= 3, "megalite's kernels take [i, j, k] or [i, j, k, columns]");
  return {static_cast<const T*>(t->const_data_ptr()), {t->stride(0), t->stride(1), t->stride(2)}};
}

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), "megalite's kernels take contiguous [i, j, k, columns]");
  return {{x.size(0), x.size(1), x.size(2)}, x.size(3)};
}

Type type_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "megalite's kernels take float32, float16 and bfloat16");
  return type == ScalarType::Float  ? Type::kFloat
         : type == ScalarType::Half ? Type::kHalf
                                    : Type::kBFloat16;
}

const void* data(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

Dropout dropout_of(const MaybeTensor& rows, const MaybeTensor& samples, int64_t place, int64_t key0,
                             int64_t key1, int64_t limit, double factor) {
  return {per_row<int64_t>(rows), per_row<int64_t>(samples), static_cast<uint32_t>(place),
          {static_cast<uint32_t>(key0), static_cast<uint32_t>(key1)}, static_cast<uint32_t>(limit),
          static_cast<float>(factor)};
}

// The CPU

#define MEMBER(kernel, A) void (*kernel)(const A&, int64_t, int64_t, float*);
#define BASELINE(kernel, A) megalite_##kernel##_baseline,
#define AVX2(kernel, A) megalite_##kernel##_avx2,
#define AVX512(kernel, A) megalite_##kernel##_avx512,

struct Cpu {
  int64_t lanes;
  MEGALITE_KERNELS(MEMBER)
};

const Cpu& cpu() {
  static const Cpu best = [] {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return Cpu{16, MEGALITE_KERNELS(AVX512)};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Cpu{8, MEGALITE_KERNELS(AVX2)};
#endif
    return Cpu{4, MEGALITE_KERNELS(BASELINE)};
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

#define RUN_ON_CPU(kernel, A) \
  static void kernel(const Tensor&, const A& a) { on_cpu(cpu().kernel, a); }

struct OnCpu {
  MEGALITE_KERNELS(RUN_ON_CPU)
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

#define RUN_ON_CUDA(kernel, A) \
  static void kernel(const Tensor& x, const A& a) { on_cuda(megalite_##kernel##_cuda, x, a); }

struct OnCuda {
  MEGALITE_KERNELS(RUN_ON_CUDA)
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

template <class Device>
void bias_gelu(const Tensor& x, const MaybeTensor& bias, const MaybeTensor& grad, Tensor out) {
  const BiasGelu a{shape_of(x), type_of(x), x.const_data_ptr(), data(bias), data(grad), out.mutable_data_ptr()};
  grad ? Device::bias_gelu_backward(x, a) : Device::bias_gelu_forward(x, a);
}

template <class Device>
void swiglu(const Tensor& x, const MaybeTensor& grad, Tensor out) {
  Shape shape = shape_of(x);
  shape.columns /= 2;
  const SwiGlu a{shape, type_of(x), x.const_data_ptr(), data(grad), out.mutable_data_ptr()};
  grad ? Device::swiglu_backward(x, a) : Device::swiglu_forward(x, a);
}

template <class Device>
void rms_norm_forward(const Tensor& x, const MaybeTensor& residual, const Tensor& weight, double epsilon, Tensor out,
                      MaybeTensor sum, Tensor scale) {
  const Shape s = shape_of(x);
  const int64_t rows = s.size[0] * s.size[1] * s.size[2];
  Device::rms_norm_forward(x, {{{rows, 1, 1}, s.columns}, type_of(x), rows, 1, static_cast<float>(epsilon),
                               x.const_data_ptr(), data(residual), weight.const_data_ptr(), nullptr, nullptr,
                               out.mutable_data_ptr(), sum ? sum->mutable_data_ptr() : nullptr,
                               static_cast<float*>(scale.mutable_data_ptr()), nullptr});
}

template <class Device>
void rms_norm_backward(const Tensor& x, const Tensor& weight, const Tensor& grad, const MaybeTensor& grad_sum,
                       Tensor scale, int64_t group, Tensor out, Tensor grad_weight) {
  const Shape s = shape_of(x);
  const int64_t rows = s.size[0] * s.size[1] * s.size[2];
  Device::rms_norm_backward(x, {{{grad_weight.size(0), 1, 1}, s.columns}, type_of(x), rows, group, 0,
                                x.const_data_ptr(), nullptr, weight.const_data_ptr(), grad.const_data_ptr(),
                                data(grad_sum), out.mutable_data_ptr(), nullptr,
                                static_cast<float*>(scale.mutable_data_ptr()),
                                static_cast<float*>(grad_weight.mutable_data_ptr())});
}

template <class Device>
void rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse, Tensor out) {
  Device::rotary(x, {shape_of(out), type_of(x), inverse, per_row<void>(x), per_row<void>(cos), per_row<void>(sin),
                     out.mutable_data_ptr()});
}

template <class Device>
void cross_entropy_forward(const Tensor& logits, const Tensor& labels, int64_t valid, Tensor top, Tensor sum,
                           Tensor target) {
  Device::cross_entropy_forward(
      logits, {shape_of(logits), type_of(logits), valid, const_cast<void*>(logits.const_data_ptr()),
               static_cast<const int64_t*>(labels.const_data_ptr()), static_cast<float*>(top.mutable_data_ptr()),
               static_cast<float*>(sum.mutable_data_ptr()), static_cast<float*>(target.mutable_data_ptr()), nullptr,
               nullptr});
}

template <class Device>
void cross_entropy_backward(Tensor logits, const Tensor& labels, int64_t valid, const Tensor& lse,
                            const Tensor& grad) {
  Device::cross_entropy_backward(
      logits, {shape_of(logits), type_of(logits), valid, logits.mutable_data_ptr(),
               static_cast<const int64_t*>(labels.const_data_ptr()), nullptr, nullptr, nullptr,
               static_cast<const float*>(lse.const_data_ptr()), static_cast<const float*>(grad.const_data_ptr())});
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
  m.def("_bias_gelu(Tensor x, Tensor? bias, Tensor? grad, Tensor(a!) out) -> ()");
  m.def("_swiglu(Tensor x, Tensor? grad, Tensor(a!) out) -> ()");
  m.def("_rms_norm_forward(Tensor x, Tensor? residual, Tensor weight, float epsilon, Tensor(a!) out, Tensor(b!)? sum, "
        "Tensor(c!) scale) -> ()");
  m.def("_rms_norm_backward(Tensor x, Tensor weight, Tensor grad, Tensor? grad_sum, Tensor scale, int group, "
        "Tensor(a!) out, Tensor(b!) grad_weight) -> ()");
  m.def("_rotary(Tensor x, Tensor cos, Tensor sin, bool inverse, Tensor(a!) out) -> ()");
  m.def("_cross_entropy_forward(Tensor logits, Tensor labels, int valid, Tensor(a!) top, Tensor(b!) sum, "
        "Tensor(c!) target) -> ()");
  m.def("_cross_entropy_backward(Tensor(a!) logits, Tensor labels, int valid, Tensor lse, Tensor grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megalite, CompositeExplicitAutograd, m) { m.impl("_cpu_lanes", TORCH_BOX(&cpu_lanes)); }

#define IMPLEMENT(Device)                                                        \
  m.impl("_softmax_forward", TORCH_BOX(&softmax_forward<Device>));               \
  m.impl("_softmax_backward", TORCH_BOX(&softmax_backward<Device>));             \
  m.impl("_bias_dropout_add", TORCH_BOX(&bias_dropout_add<Device>));             \
  m.impl("_bias_gelu", TORCH_BOX(&bias_gelu<Device>));                           \
  m.impl("_swiglu", TORCH_BOX(&swiglu<Device>));                                 \
  m.impl("_rms_norm_forward", TORCH_BOX(&rms_norm_forward<Device>));             \
  m.impl("_rms_norm_backward", TORCH_BOX(&rms_norm_backward<Device>));           \
  m.impl("_rotary", TORCH_BOX(&rotary<Device>));                                 \
  m.impl("_cross_entropy_forward", TORCH_BOX(&cross_entropy_forward<Device>));   \
  m.impl("_cross_entropy_backward", TORCH_BOX(&cross_entropy_backward<Device>));

STABLE_TORCH_LIBRARY_IMPL(megalite, CPU, m) { IMPLEMENT(OnCpu) }
#ifdef MEGALITE_CUDA
STABLE_TORCH_LIBRARY_IMPL(megalite, CUDA, m) { IMPLEMENT(OnCuda) }
#endif
