// x86-64 with AVX2 and FMA: 8 lanes.
#ifdef __x86_64__
#define MEGALITE_LANES 8
#define MEGALITE_NAME(kernel) megalite_##kernel##_avx2
#define MEGALITE_TARGET "avx2,fma"
#include "cpu.h"
#endif
