KERNELS = "of apex.optimizers"
