"""How the GPU does it: Triton kernels, one launcher per op, launch parameters."""
