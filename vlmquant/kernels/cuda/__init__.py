"""Our CUDA kernels: their sources, how they are built and launched, and which of them runs when."""
