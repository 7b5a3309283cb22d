// RMSNorm and cross-entropy on a GPU: a block per group of rows, or per row.
#include "cuda.cuh"  // first: it says what the others are compiled for

#include "cross_entropy.h"
#include "norm.h"

MEGALITE_DEFINE_CUDA(rms_norm_forward, RmsNorm, launch_blocks)
MEGALITE_DEFINE_CUDA(rms_norm_backward, RmsNorm, launch_blocks)
MEGALITE_DEFINE_CUDA(cross_entropy_forward, CrossEntropy, launch_blocks)
MEGALITE_DEFINE_CUDA(cross_entropy_backward, CrossEntropy, launch_blocks)
