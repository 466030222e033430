// Just enough of CUDA to run a kernel as plain C++: one thread per block, blocks one after another. It checks what a
// kernel computes and, under the sanitizers, where it reads and writes; not races, which need a GPU.
#pragma once

#include <cstddef>
#include <vector>

#define __global__ inline
#define __device__
#define DZ_SHARED(type, name) type* name = reinterpret_cast<type*>(cuda_on_host::shared.data())

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace cuda_on_host {
inline std::vector<double> shared;
}

inline Dim3 gridDim, blockDim, blockIdx, threadIdx{0, 0, 0};
inline void __syncthreads() {}

// kernel<<<{grid_x, grid_y}, 1, shared_bytes>>>(args...). Shared memory has exactly that size (rounded up to doubles).
template <typename Kernel, typename... Args>
void launch_on_host(Kernel kernel, unsigned grid_x, unsigned grid_y, size_t shared_bytes, Args... args) {
  cuda_on_host::shared = std::vector<double>((shared_bytes + sizeof(double) - 1) / sizeof(double));
  gridDim = {grid_x, grid_y, 1};
  for (unsigned y = 0; y < grid_y; ++y) {
    for (unsigned x = 0; x < grid_x; ++x) {
      blockIdx = {x, y, 0};
      kernel(args...);
    }
  }
}
