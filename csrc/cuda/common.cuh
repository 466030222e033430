// What the CUDA kernels share. No framework headers: everything here compiles on a machine with nvcc and no GPU, and
// the kernels also compile as plain C++ (csrc/tests/cuda_on_host.h), so that they can be tested without a GPU. They are
// right for any power-of-two block size, 1 included, but for those that say how many threads they need.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
// Dynamic shared memory of a kernel.
#define DZ_SHARED(type, name)                          \
  extern __shared__ __align__(16) double name##_raw[]; \
  type* name = reinterpret_cast<type*>(name##_raw)
#define DZ_EXPORT extern "C" __attribute__((visibility("default")))
#else
#include "tests/cuda_on_host.h"
#endif

namespace dz {

constexpr int kThreads = 256;
constexpr int64_t kSharedBytes = 48 * 1024;  // what every GPU gives a block without asking

// The sum of `value` over the block, in a fixed order, in all threads. `part` has room for one double per thread.
__device__ inline double block_sum(double value, double* part) {
  part[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  const double total = part[0];
  __syncthreads();
  return total;
}

}  // namespace dz
