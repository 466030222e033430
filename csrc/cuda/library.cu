// The shared library dzkernels._cuda: all kernels and their launchers. It loads without a GPU; a launch then returns an
// error.
#include "channel_batch_norm.cuh"
#include "channel_conv2d.cuh"
#include "conv2d_tap.cuh"
#include "cross_entropy_difference.cuh"
#include "dense_conv2d.cuh"

DZ_EXPORT const char* dz_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
