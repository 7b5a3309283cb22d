// residual + dropout(x + bias) on a GPU: a block per row.
#include "cuda.cuh"  // first: it says what the others are compiled for

#include "dropout.h"

MEGALITE_DEFINE_CUDA(bias_dropout_add, BiasDropoutAdd, launch_blocks)
