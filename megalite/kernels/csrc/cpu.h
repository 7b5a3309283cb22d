// The kernels for one instruction set. Each cpu_*.cpp sets MEGALITE_LANES and, if it needs one, MEGALITE_TARGET, then
// includes this file, so that all of it is compiled for that target. Everything is inlined or lies in an unnamed
// namespace: nothing can stand in for the code of another target when they are linked. For the same reason no templates
// of the standard library are used.
#include <math.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "arguments.h"

#define MEGALITE_EXPORT extern "C" __attribute__((visibility("default")))

#define MEGALITE_PRAGMA(words) _Pragma(#words)
#ifdef __clang__
#define MEGALITE_BEGIN(set) MEGALITE_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define MEGALITE_END _Pragma("clang attribute pop")
#else
#define MEGALITE_BEGIN(set) _Pragma("GCC push_options") MEGALITE_PRAGMA(GCC target(set))
#define MEGALITE_END _Pragma("GCC pop_options")
#endif

#ifdef MEGALITE_TARGET
MEGALITE_BEGIN(MEGALITE_TARGET)
#endif

#include "activation.h"
#include "cross_entropy.h"
#include "dropout.h"
#include "norm.h"
#include "rotary.h"
#include "softmax.h"

namespace {
using namespace megalite;

constexpr int kLanes = MEGALITE_LANES;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Longs __attribute__((vector_size(4 * kLanes)));  // half as many
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef int8_t Chars __attribute__((vector_size(1 * kLanes)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_of(From v) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To result;
  memcpy(&result, &v, sizeof v);
  return result;
}

template <class V, class T>
inline V read(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline Floats floats(const float* p) { return read<Floats>(p); }

inline Floats floats(const BFloat16* p) {
  return bits_of<Floats>(__builtin_convertvector(read<Shorts>(p), Words) << 16);
}

// 2^112 moves the exponent of fp16 to that of fp32, subnormal numbers included; infinity and NaN keep the largest.
inline Floats floats(const Half* p) {
  const Words h = __builtin_convertvector(read<Shorts>(p), Words);
  const Words finite = bits_of<Words>(bits_of<Floats>((h & 0x7fff) << 13) * 0x1p112f);
  const Words special = ((h & 0x7fff) << 13) | 0x7f800000;
  return bits_of<Floats>(((h & 0x7c00) == 0x7c00 ? special : finite) | (h & 0x8000) << 16);
}

inline void write(float* p, Floats v) { memcpy(p, &v, sizeof v); }

inline void write(BFloat16* p, Floats v) {
  const Words u = bits_of<Words>(v);
  const Words nearest_even = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Shorts s = __builtin_convertvector(v != v ? (u >> 16) | 0x40 : nearest_even, Shorts);
  memcpy(p, &s, sizeof s);
}

// Adding 2^(e + 13), where e is the exponent of the result's last place, makes the addition round to nearest even.
inline void write(Half* p, Floats v) {
  const Words u = bits_of<Words>(v), magnitude = u & 0x7fffffff, exponent = u & 0x7f800000;
  const Words least = Words{} + (113u << 23);  // 2^-14: below it fp16 is subnormal
  const Floats base = bits_of<Floats>((exponent > least ? exponent : least) + (13u << 23));
  const Words mantissa = bits_of<Words>(bits_of<Floats>(magnitude) + base) - bits_of<Words>(base);
  const Words unit = ((exponent > least ? exponent : least) - least) >> 13;  // exponent of fp16, less one
  const Words finite = unit + mantissa;
  const Words large = magnitude > 0x7f800000 ? Words{} + 0x7e00 : Words{} + 0x7c00;
  const Words half = (magnitude >= (143u << 23) ? large : finite) | (u >> 16 & 0x8000);
  const Shorts s = __builtin_convertvector(half, Shorts);
  memcpy(p, &s, sizeof s);
}

// Combines the lanes of a vector: its two halves first.
template <class V, class F>
inline float reduce(V v, F combine) {
  constexpr int kHalf = sizeof(V) / 2;
  if constexpr (kHalf == sizeof(float)) return combine(v[0], v[1]);
  else {
    typedef float Part __attribute__((vector_size(kHalf)));
    Part halves[2];
    memcpy(halves, &v, sizeof v);
    return reduce(combine(halves[0], halves[1]), combine);
  }
}

// The lanes of a register. Steps lie side by side; the last one may be partly outside of the row, unless kInner.
template <bool kInner>
struct Lanes {
  using V = Floats;
  using M = Ints;
  using U = Words;
  static constexpr int kWidth = kLanes;
  static constexpr bool kKeepsInputs = false, kKeepsResults = true, kHasInner = !kInner;
  float* scratch;  // two rows
  int64_t stride;

  Lanes<true> inner() const { return {scratch, stride}; }
  int steps(int columns) const { return (columns + kWidth - 1) / kWidth; }
  int column(int k) const { return k * kWidth; }
  bool first() const { return true; }
  V splat(float f) const { return V{} + f; }
  V select(M m, V a, V b) const { return m ? a : b; }
  V select(M m, V a, float b) const { return m ? a : splat(b); }
  V select(bool m, V a, float b) const { return m ? a : splat(b); }
  V max(V a, V b) const { return a > b ? a : b; }
  void keep(int slot, int k, V v) const { memcpy(scratch + slot * stride + k * kWidth, &v, sizeof v); }
  V kept(int slot, int k) const { return read<V>(scratch + slot * stride + k * kWidth); }

  V inside(int c, int columns, V v, float otherwise) const {
    if (kInner || c + kWidth <= columns) return v;
    M index;
    for (int i = 0; i < kWidth; ++i) index[i] = i;
    return select(index < columns - c, v, otherwise);
  }

  // The first `visible` of `columns` elements, 0 in their place beyond.
  template <class T>
  V load(const T* p, int c, int visible, int columns) const {
    if (kInner || c + kWidth <= columns) return inside(c, visible, floats(p + c), 0.f);
    T part[kWidth] = {};
    for (int i = 0; c + i < visible; ++i) part[i] = p[c + i];
    return floats(part);
  }

  // By way of 16 bits: GCC 12 widens bytes to 32 bits one by one.
  static M nonzero(const uint8_t* p) {
    return __builtin_convertvector(__builtin_convertvector(read<Chars>(p), Shorts), M) != 0;
  }

  M load_mask(const uint8_t* p, int c, int visible, int columns) const {
    if (kInner || c + kWidth <= columns) return nonzero(p + c);
    uint8_t part[kWidth] = {};
    for (int i = 0; c + i < visible; ++i) part[i] = p[c + i];
    return nonzero(part);
  }

  void will_read(const void* p) const { __builtin_prefetch(p, 0); }
  void will_write(const void* p) const { __builtin_prefetch(p, 1); }

  template <class T>
  void store(T* p, int c, int columns, V v) const {
    if (kInner || c + kWidth <= columns) return write(p + c, v);
    T part[kWidth];
    write(part, v);
    for (int i = 0; c + i < columns; ++i) p[c + i] = part[i];
  }

  // The columns after the steps for the first `done`.
  template <class T>
  void fill(T* p, int done, int columns, float value) const {
    for (int c = column(steps(done)); c < columns; c += kWidth) store(p, c, columns, splat(value));
  }

  float reduce_max(V v) const {
    return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
  }
  float reduce_sum(V v) const {
    return reduce(v, [](auto a, auto b) { return a + b; });
  }
  float log(float x) const { return logf(x); }
  float sqrt(float x) const { return sqrtf(x); }

  template <class T>
  float value(T x) const {
    T many[kWidth] = {x};
    return floats(many)[0];
  }

  // 1 in lane `lane` if there is such a lane, 0 in others.
  V one_at(int lane) const {
    float lanes[kWidth] = {};
    if (lane >= 0 && lane < kWidth) lanes[lane] = 1;
    return read<V>(lanes);
  }

  // e^x = 2^n e^r with n the nearest integer to x / ln 2 (ln 2 in two parts, so that r is exact) and the polynomial of
  // Cephes' expf for e^r. Below 2^-126 it gives 0.
  ROW_FN V exp(V x) const {
    const float round = 0x1.8p23f;  // adding it leaves n in the last bits
    const V shifted = x * 1.44269504f + round;
    const V n = shifted - round;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    const V power = bits_of<V>((bits_of<Words>(shifted) + 127) << 23);
    const V result = p * power;
    return x < -87.3f ? splat(0.f) : x > 88.f ? splat(kInfinity) : result;
  }

  // A counter is a pair of 64-bit lanes here, of which Philox needs the low halves: products need no interleaving.
  static Longs multiply(Longs a, uint32_t b) {
#if MEGALITE_LANES == 16
    return (Longs)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));  // not the plain one: GCC 12 warns
#elif MEGALITE_LANES == 8
    return (Longs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (Longs)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & 0xffffffff) * b;
#endif
  }
  static Longs high(Longs p) { return p >> 32; }
  static Longs low(Longs p) { return p; }  // philox() and `multiply` do not look at the upper half

  // The four words of the kWidth counters from `start` on: even and odd ones apart, so that each pair makes one lane.
  void random(U (&words)[4], int start, const Counter& counter, const uint32_t (&key)[2]) const {
    Longs even[4], odd[4];
    for (int i = 0; i < kWidth / 2; ++i) even[0][i] = 2 * i;
    even[0] += static_cast<uint64_t>(start);
    odd[0] = even[0] + 1;
    for (int w = 1; w < 4; ++w) odd[w] = even[w] = Longs{} + counter.word[w - 1];
    philox<Lanes>(even, key[0], key[1]);
    philox<Lanes>(odd, key[0], key[1]);
    for (int w = 0; w < 4; ++w) words[w] = (U)((even[w] & 0xffffffff) | odd[w] << 32);
  }
};

template <class F>
inline void by_type(Type type, F f) {
  if (type == Type::kFloat) f(float{});
  else if (type == Type::kHalf) f(Half{});
  else f(BFloat16{});
}

}  // namespace

#define MEGALITE_DEFINE(kernel, Arguments)                                                                        \
  MEGALITE_EXPORT void MEGALITE_NAME(kernel)(const Arguments& a, int64_t begin, int64_t end, float* scratch) {    \
    const Lanes<false> lanes{scratch, (a.shape.columns + kLanes - 1) / kLanes * kLanes};                          \
    by_type(a.type, [&](auto zero) {                                                                              \
      for (int64_t row = begin; row < end; ++row) kernel<decltype(zero)>(lanes, a, row);                          \
    });                                                                                                           \
  }
MEGALITE_KERNELS(MEGALITE_DEFINE)

#ifdef MEGALITE_TARGET
MEGALITE_END
#endif
