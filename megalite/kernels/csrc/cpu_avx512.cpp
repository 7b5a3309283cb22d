// x86-64 with AVX-512: 16 lanes.
#ifdef __x86_64__
#define MEGALITE_LANES 16
#define MEGALITE_NAME(kernel) megalite_##kernel##_avx512
#define MEGALITE_TARGET_BEGIN         \
  _Pragma("GCC push_options") \
  _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma\")")
#define MEGALITE_TARGET_END _Pragma("GCC pop_options")
#include "cpu.h"
#endif
