"""C++ kernels: allocate the result and hand addresses to dzkernels._C."""
