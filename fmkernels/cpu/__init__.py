"""How the CPU does it: the same names and signatures as ``launch_*`` in fmkernels.kernels, in blocked PyTorch."""
