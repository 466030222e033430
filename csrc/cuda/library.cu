// The shared library dzkernels._cuda: all kernels and their launchers. It loads without a GPU; a launch then returns an
// error.
#include "cuda_list.h"  // includes every <op>.cuh; written by setup.py

DZ_EXPORT const char* dz_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
