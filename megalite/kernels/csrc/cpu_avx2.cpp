// x86-64 with AVX2 and FMA: 8 lanes.
#ifdef __x86_64__
#define MEGALITE_LANES 8
#define MEGALITE_NAME(kernel) megalite_##kernel##_avx2
#define MEGALITE_TARGET_BEGIN _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define MEGALITE_TARGET_END _Pragma("GCC pop_options")
#include "cpu.h"
#endif
