#pragma once

#include "common.cuh"

namespace dz {

// Blocks along x: one per plane (p, n). Blocks along y share the pixels of a plane. Arguments as in
// csrc/cpu/conv2d_tap.cpp.
__global__ void conv2d_tap_kernel(const float* x, const int64_t* coord, const float* step, float* out, int64_t N,
                                  int64_t H, int64_t W, int64_t Ho, int64_t Wo, int64_t xn, int64_t xc, int64_t xh,
                                  int64_t xw, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                                  int64_t dil_h, int64_t dil_w, int64_t in_per_group, int64_t out_per_group) {
  const int64_t plane = blockIdx.x, p = plane / N, n = plane % N;
  const int64_t o = coord[4 * p], c = coord[4 * p + 1];
  const int64_t top = coord[4 * p + 2] * dil_h - pad_h, left = coord[4 * p + 3] * dil_w - pad_w;
  const float h = step[p];
  const float* from = x + n * xn + (o / out_per_group * in_per_group + c) * xc;
  float* to = out + plane * Ho * Wo;
  const int64_t grid_stride = static_cast<int64_t>(gridDim.y) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; i < Ho * Wo; i += grid_stride) {
    const int64_t row = i / Wo * stride_h + top, column = i % Wo * stride_w + left;
    const bool inside = row >= 0 && row < H && column >= 0 && column < W;
    to[i] = inside ? h * from[row * xh + column * xw] : 0.0f;
  }
}

}  // namespace dz

DZ_EXPORT int dz_conv2d_tap(const float* x, const int64_t* coord, const float* step, float* out, int64_t P, int64_t N,
                            int64_t H, int64_t W, int64_t Ho, int64_t Wo, int64_t xn, int64_t xc, int64_t xh,
                            int64_t xw, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h,
                            int64_t dil_w, int64_t in_per_group, int64_t out_per_group, cudaStream_t stream) {
  if (P * N == 0) return cudaSuccess;
  const int64_t chunks = (Ho * Wo + 4 * dz::kThreads - 1) / (4 * dz::kThreads);
  const dim3 grid(static_cast<unsigned>(P * N), static_cast<unsigned>(chunks < 1024 ? chunks : 1024));
  return dz::launch(dz::conv2d_tap_kernel, grid, dz::block_of(dz::kThreads), 0, stream, x, coord, step, out, N, H, W,
                    Ho, Wo, xn, xc, xh, xw, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, in_per_group,
                    out_per_group);
}
