"""How the GPU does it: Triton kernels, the functions that launch them, and their launch parameters."""
