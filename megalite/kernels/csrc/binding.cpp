// Registers the kernels as operators megalite::_... over torch's stable ABI: one build serves all Pythons and later
// versions of torch. They are the native bodies of the operators that the Python modules beside this folder define;
// these allocate the outputs, and view tensors as [i, j, k, columns] (arguments.h). Whatever a kernel reads or writes is
// checked here once more, for operators of a backward can be called by anyone.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <memory>
#include <optional>
#include <type_traits>

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

using torch::headeronly::ScalarType;

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), "megalite's kernels take contiguous [i, j, k, columns]");
  // Columns are counted in 32 bits, and the last step of a group of lanes may end after the row.
  STD_TORCH_CHECK(x.size(3) <= INT_MAX - 4096, "megalite's kernels take rows of up to ", INT_MAX - 4096,
                  " columns, not ", x.size(3));
  return {{x.size(0), x.size(1), x.size(2)}, x.size(3)};
}

bool same_device(const Tensor& t, const Tensor& x) {
  return t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index();
}

// Tensor t, if there is one, must be `rows` times `columns` contiguous elements of the type, where x is.
void expect(const char* name, const MaybeTensor& t, const Tensor& x, int64_t rows, int64_t columns, ScalarType type) {
  if (!t) return;
  const bool fits = t->numel() == rows * columns && (columns == 1 || t->size(t->dim() - 1) == columns);
  STD_TORCH_CHECK(fits, name, " has ", t->numel(), " elements, not ", rows, " rows of ", columns);
  STD_TORCH_CHECK(t->scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(t->is_contiguous() && same_device(*t, x), name, " is not contiguous, or on another device");
}

// Something of rows of this shape, of any strides; `columns`: each row has as many neighbouring elements, or is one.
template <class T>
PerRow<T> per_row(const char* name, const MaybeTensor& t, const Tensor& x, const Shape& s, int64_t columns,
                  ScalarType type) {
  if (!t) return {};
  bool fits = t->dim() == (columns ? 4 : 3);
  for (int i = 0; fits && i < 3; ++i) fits = t->size(i) == s.size[i];
  if (fits && columns) fits = t->size(3) == columns && (columns == 1 || t->stride(3) == 1);
  STD_TORCH_CHECK(fits, name, " does not have the rows and columns of the tensor");
  STD_TORCH_CHECK(t->scalar_type() == type && same_device(*t, x), name, " has the wrong dtype or device");
  return {static_cast<const T*>(t->const_data_ptr()), {t->stride(0), t->stride(1), t->stride(2)}};
}

Type type_of(const Tensor& x) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "megalite's kernels take float32, float16 and bfloat16");
  return type == ScalarType::Float  ? Type::kFloat
         : type == ScalarType::Half ? Type::kHalf
                                    : Type::kBFloat16;
}

const void* data(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

Dropout dropout_of(const Tensor& x, const MaybeTensor& rows, const MaybeTensor& samples, int64_t place, int64_t key0,
                   int64_t key1, int64_t limit, double factor) {
  STD_TORCH_CHECK(rows.has_value() == samples.has_value(), "dropout takes both rows and samples");
  const Shape s = shape_of(x);
  return {per_row<int64_t>("rows", rows, x, s, 0, ScalarType::Long),
          per_row<int64_t>("samples", samples, x, s, 0, ScalarType::Long), static_cast<uint32_t>(place),
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

// How many rows of the tensor a row of the shape stands for.
template <class A>
int64_t rows_per_unit(const A&) { return 1; }
int64_t rows_per_unit(const RmsNorm& a) { return a.group; }

template <class A>
void on_cpu(void (*kernel)(const A&, int64_t, int64_t, float*), const A& a) {
  const auto& s = a.shape;
  const int64_t grain = 1 + kElementsPerTask / (rows_per_unit(a) * s.columns + 1);
  torch::stable::parallel_for(0, s.rows(), grain, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> scratch;  // two rows, each rounded up to whole registers; only softmax keeps any
    if constexpr (std::is_same_v<A, Softmax>) scratch.reset(new float[2 * (s.columns + 64)]);
    kernel(a, begin, end, scratch.get());
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
  const Shape s = shape_of(x);
  expect("out", out, x, s.rows(), s.columns, x.scalar_type());
  expect("lse", lse, x, s.rows(), 1, ScalarType::Float);
  Device::softmax_forward(
      x, {s, type_of(x), causal, static_cast<float>(scale),
          per_row<uint8_t>("the mask", mask, x, s, s.columns, ScalarType::Bool),
          dropout_of(x, rows, samples, place, key0, key1, limit, factor), x.const_data_ptr(), nullptr, nullptr,
          out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr())});
}

template <class Device>
void softmax_backward(const Tensor& grad, const MaybeTensor& x, const MaybeTensor& y, const MaybeTensor& mask,
                      bool causal, double scale, const MaybeTensor& rows, const MaybeTensor& samples, int64_t place,
                      int64_t key0, int64_t key1, int64_t limit, double factor, Tensor out, Tensor lse) {
  const Shape s = shape_of(grad);
  STD_TORCH_CHECK(rows ? x.has_value() : y.has_value(), "softmax's backward needs x with dropout, y without");
  expect("x", x, grad, s.rows(), s.columns, grad.scalar_type());
  expect("y", y, grad, s.rows(), s.columns, grad.scalar_type());
  expect("out", out, grad, s.rows(), s.columns, grad.scalar_type());
  expect("lse", lse, grad, s.rows(), 1, ScalarType::Float);
  Device::softmax_backward(
      grad, {s, type_of(grad), causal, static_cast<float>(scale),
             per_row<uint8_t>("the mask", mask, grad, s, s.columns, ScalarType::Bool),
             dropout_of(grad, rows, samples, place, key0, key1, limit, factor), data(x), grad.const_data_ptr(),
             data(y), out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr())});
}

template <class Device>
void bias_dropout_add(const Tensor& x, const MaybeTensor& bias, const MaybeTensor& residual, const Tensor& rows,
                      const Tensor& samples, int64_t place, int64_t key0, int64_t key1, int64_t limit, double factor,
                      Tensor out) {
  const Shape s = shape_of(x);
  expect("the bias", bias, x, 1, s.columns, x.scalar_type());
  expect("the residual", residual, x, s.rows(), s.columns, x.scalar_type());
  expect("out", out, x, s.rows(), s.columns, x.scalar_type());
  Device::bias_dropout_add(x, {s, type_of(x), dropout_of(x, rows, samples, place, key0, key1, limit, factor),
                               x.const_data_ptr(), data(bias), data(residual), out.mutable_data_ptr()});
}

template <class Device>
void bias_gelu(const Tensor& x, const MaybeTensor& bias, const MaybeTensor& grad, Tensor out) {
  const Shape s = shape_of(x);
  expect("the bias", bias, x, 1, s.columns, x.scalar_type());
  expect("grad", grad, x, s.rows(), s.columns, x.scalar_type());
  expect("out", out, x, s.rows(), s.columns, x.scalar_type());
  const BiasGelu a{s, type_of(x), x.const_data_ptr(), data(bias), data(grad), out.mutable_data_ptr()};
  grad ? Device::bias_gelu_backward(x, a) : Device::bias_gelu_forward(x, a);
}

template <class Device>
void swiglu(const Tensor& x, const MaybeTensor& grad, Tensor out) {
  Shape s = shape_of(x);
  STD_TORCH_CHECK(s.columns % 2 == 0, "swiglu takes gate and up in one tensor [..., 2 f]");
  s.columns /= 2;
  expect("grad", grad, x, s.rows(), s.columns, x.scalar_type());
  expect("out", out, x, s.rows(), (grad ? 2 : 1) * s.columns, x.scalar_type());
  const SwiGlu a{s, type_of(x), x.const_data_ptr(), data(grad), out.mutable_data_ptr()};
  grad ? Device::swiglu_backward(x, a) : Device::swiglu_forward(x, a);
}

template <class Device>
void rms_norm_forward(const Tensor& x, const MaybeTensor& residual, const Tensor& weight, double epsilon, Tensor out,
                      MaybeTensor sum, Tensor scale) {
  const Shape s = shape_of(x);
  const int64_t rows = s.rows();
  STD_TORCH_CHECK(residual.has_value() == sum.has_value(), "a sum comes with a residual");
  expect("the residual", residual, x, rows, s.columns, x.scalar_type());
  expect("the weight", weight, x, 1, s.columns, x.scalar_type());
  expect("out", out, x, rows, s.columns, x.scalar_type());
  expect("sum", sum, x, rows, s.columns, x.scalar_type());
  expect("scale", scale, x, rows, 1, ScalarType::Float);
  Device::rms_norm_forward(x, {{{rows, 1, 1}, s.columns}, type_of(x), rows, 1, static_cast<float>(epsilon),
                               x.const_data_ptr(), data(residual), weight.const_data_ptr(), nullptr, nullptr,
                               out.mutable_data_ptr(), sum ? sum->mutable_data_ptr() : nullptr,
                               static_cast<float*>(scale.mutable_data_ptr()), nullptr});
}

template <class Device>
void rms_norm_backward(const Tensor& x, const Tensor& weight, const Tensor& grad, const MaybeTensor& grad_sum,
                       Tensor scale, int64_t group, Tensor out, Tensor grad_weight) {
  const Shape s = shape_of(x);
  const int64_t rows = s.rows();
  STD_TORCH_CHECK(group > 0, "a group has rows");
  const int64_t groups = (rows + group - 1) / group;
  expect("the weight", weight, x, 1, s.columns, x.scalar_type());
  expect("grad", grad, x, rows, s.columns, x.scalar_type());
  expect("grad_sum", grad_sum, x, rows, s.columns, x.scalar_type());
  expect("scale", scale, x, rows, 1, ScalarType::Float);
  expect("out", out, x, rows, s.columns, x.scalar_type());
  expect("grad_weight", grad_weight, x, groups, s.columns, ScalarType::Float);
  Device::rms_norm_backward(x, {{{groups, 1, 1}, s.columns}, type_of(x), rows, group, 0,
                                x.const_data_ptr(), nullptr, weight.const_data_ptr(), grad.const_data_ptr(),
                                data(grad_sum), out.mutable_data_ptr(), nullptr,
                                static_cast<float*>(scale.mutable_data_ptr()),
                                static_cast<float*>(grad_weight.mutable_data_ptr())});
}

template <class Device>
void rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse, Tensor out) {
  const Shape s = shape_of(out);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(s.columns % 2 == 0, "rotary takes an even number of columns");
  expect("out", out, x, s.rows(), s.columns, type);
  Device::rotary(x, {s, type_of(x), inverse, per_row<void>("x", x, x, s, s.columns, type),
                     per_row<void>("cos", cos, x, s, s.columns, type),
                     per_row<void>("sin", sin, x, s, s.columns, type), out.mutable_data_ptr()});
}

void expect_labels(const Tensor& logits, const Shape& s, const Tensor& labels, int64_t valid) {
  expect("labels", labels, logits, s.rows(), 1, ScalarType::Long);
  STD_TORCH_CHECK(valid >= 0 && valid <= s.columns, "valid is ", valid, " of ", s.columns, " columns");
}

template <class Device>
void cross_entropy_forward(const Tensor& logits, const Tensor& labels, int64_t valid, Tensor top, Tensor sum,
                           Tensor target) {
  const Shape s = shape_of(logits);
  expect_labels(logits, s, labels, valid);
  expect("top", top, logits, s.rows(), 1, ScalarType::Float);
  expect("sum", sum, logits, s.rows(), 1, ScalarType::Float);
  expect("target", target, logits, s.rows(), 1, ScalarType::Float);
  Device::cross_entropy_forward(
      logits, {s, type_of(logits), valid, const_cast<void*>(logits.const_data_ptr()),
               static_cast<const int64_t*>(labels.const_data_ptr()), static_cast<float*>(top.mutable_data_ptr()),
               static_cast<float*>(sum.mutable_data_ptr()), static_cast<float*>(target.mutable_data_ptr()), nullptr,
               nullptr});
}

template <class Device>
void cross_entropy_backward(Tensor logits, const Tensor& labels, int64_t valid, const Tensor& lse,
                            const Tensor& grad) {
  const Shape s = shape_of(logits);
  expect_labels(logits, s, labels, valid);
  expect("lse", lse, logits, s.rows(), 1, ScalarType::Float);
  expect("grad", grad, logits, s.rows(), 1, ScalarType::Float);
  Device::cross_entropy_backward(
      logits, {s, type_of(logits), valid, logits.mutable_data_ptr(),
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
