KERNELS = "of apex.normalization"
