// residual + dropout(x + bias) on a GPU: a block per row.
#include "cuda.cuh"
#include "dropout.h"

MEGALITE_DEFINE_CUDA(bias_dropout_add, BiasDropoutAdd, launch_blocks)
