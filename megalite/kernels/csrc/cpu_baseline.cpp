// Any processor: 4 lanes, SSE2 on x86-64.
#define MEGALITE_LANES 4
#define MEGALITE_NAME(kernel) megalite_##kernel##_baseline
#include "cpu.h"
