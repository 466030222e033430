// Shared by all CUDA kernels. There are no framework headers: everything compiles with nvcc on a machine without a GPU.
// The kernels and their launchers also compile as plain C++ (csrc/tests/cuda_on_host.h), which tests them without a
// GPU. A kernel is correct for any power-of-two block size, including 1, unless its comment requires a number of
// threads.
//
// <op>.cuh ends with the launcher dz_<op>, which dzkernels/cuda/<op>.py calls. setup.py finds the files.
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

namespace dz {

// kernel<<<grid, threads, shared, stream>>>(args...), with `shared` bytes of shared memory.
template <typename... Parameters, typename... Args>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream,
                   Args... args) {
  kernel<<<grid, threads, shared, stream>>>(args...);
  return cudaGetLastError();
}

// Threads of a block, where a kernel is right for any number of them; the host takes others.
constexpr unsigned block_of(unsigned threads) { return threads; }

}  // namespace dz
#else
#include "tests/cuda_on_host.h"
#endif

namespace dz {

constexpr int kThreads = 256;
constexpr int64_t kSharedBytes = 48 * 1024;  // available to a block on every GPU without opting in

// Returns the sum of `value` over the block, in a fixed order, to all threads. `part` holds one double per thread.
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
