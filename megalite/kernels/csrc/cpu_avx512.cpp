// x86-64 with AVX-512: 16 lanes.
#ifdef __x86_64__
#define MEGALITE_LANES 16
#define MEGALITE_NAME(kernel) megalite_##kernel##_avx512
#define MEGALITE_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#include "cpu.h"
#endif
