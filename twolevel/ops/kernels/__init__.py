"""Sets of kernels for the operations of a two-level convolution: by torch, in C for CPUs, in Triton for GPUs."""
