// GELU, SwiGLU and rotary embedding on a GPU: a block per row, or a warp per head.
#include "cuda.cuh"  // first: it says what the others are compiled for

#include "activation.h"
#include "rotary.h"

MEGALITE_DEFINE_CUDA(bias_gelu_forward, BiasGelu, launch_blocks)
MEGALITE_DEFINE_CUDA(bias_gelu_backward, BiasGelu, launch_blocks)
MEGALITE_DEFINE_CUDA(swiglu_forward, SwiGlu, launch_blocks)
MEGALITE_DEFINE_CUDA(swiglu_backward, SwiGlu, launch_blocks)
MEGALITE_DEFINE_CUDA(rotary, Rotary, launch_short_rows)
