#pragma once

#include "common.cuh"

namespace dz {

// Blocks along x: one per plane (p, n). Blocks along y share the pixels of a plane. Neighbouring threads compute
// neighbouring output channels. With `staged` the weights of the perturbed channel are copied to shared memory as
// [kh * kw][out_per_group].
__global__ void channel_conv2d_kernel(const float* delta, const int64_t* channel, const float* weight, float* out,
                                      int64_t N, int64_t H, int64_t W, int64_t Ho, int64_t Wo, int64_t O, int64_t kh,
                                      int64_t kw, int64_t wo, int64_t wc, int64_t wh, int64_t ww, int64_t stride_h,
                                      int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w,
                                      int64_t in_per_group, int64_t out_per_group, bool staged) {
  DZ_SHARED(float, packed);
  const int64_t plane = blockIdx.x, c = channel[plane / N];
  const int64_t first = c / in_per_group * out_per_group;  // first output channel of the group
  const float* channel_weight = weight + first * wo + c % in_per_group * wc;
  if (staged) {
    for (int64_t i = threadIdx.x; i < kh * kw * out_per_group; i += blockDim.x) {
      const int64_t t = i / out_per_group, k = i % out_per_group;
      packed[i] = channel_weight[k * wo + t / kw * wh + t % kw * ww];
    }
    __syncthreads();
  }
  const float* from = delta + plane * H * W;
  float* to = out + plane * Ho * Wo * O;
  const int64_t grid_stride = static_cast<int64_t>(gridDim.y) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; i < Ho * Wo * O; i += grid_stride) {
    const int64_t k = i % O - first, pixel = i / O;
    float sum = 0.0f;
    if (k >= 0 && k < out_per_group) {
      const int64_t top = pixel / Wo * stride_h - pad_h, left = pixel % Wo * stride_w - pad_w;
      for (int64_t y = 0; y < kh; ++y) {
        const int64_t row = top + y * dil_h;
        if (row < 0 || row >= H) continue;
        for (int64_t x = 0; x < kw; ++x) {
          const int64_t column = left + x * dil_w;
          if (column < 0 || column >= W) continue;
          const float w = staged ? packed[(y * kw + x) * out_per_group + k] : channel_weight[k * wo + y * wh + x * ww];
          sum += from[row * W + column] * w;
        }
      }
    }
    to[i] = sum;
  }
}

}  // namespace dz

DZ_EXPORT int dz_channel_conv2d(const float* delta, const int64_t* channel, const float* weight, float* out, int64_t P,
                                int64_t N, int64_t H, int64_t W, int64_t Ho, int64_t Wo, int64_t O, int64_t kh,
                                int64_t kw, int64_t wo, int64_t wc, int64_t wh, int64_t ww, int64_t stride_h,
                                int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w,
                                int64_t in_per_group, int64_t out_per_group, cudaStream_t stream) {
  if (P * N * O == 0) return cudaSuccess;
  const int64_t bytes = kh * kw * out_per_group * static_cast<int64_t>(sizeof(float));
  const bool staged = bytes <= dz::kSharedBytes;
  // At least eight values per thread, to amortise the staging of the weights.
  const int64_t chunks = (Ho * Wo * O + 8 * dz::kThreads - 1) / (8 * dz::kThreads);
  const dim3 grid(static_cast<unsigned>(P * N), static_cast<unsigned>(chunks < 1024 ? chunks : 1024));
  return dz::launch(dz::channel_conv2d_kernel, grid, dz::block_of(dz::kThreads),
                    static_cast<size_t>(staged ? bytes : 0), stream, delta, channel, weight, out, N, H, W, Ho, Wo, O,
                    kh, kw, wo, wc, wh, ww, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, in_per_group, out_per_group,
                    staged);
}
