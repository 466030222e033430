#pragma once

#include "common.cuh"

namespace dz {

// One channel of a [N, C, H, W] tensor with any strides, read in the order of contiguous [N, H, W].
struct ChannelView {
  const float* data;
  int64_t sn, sh, sw, H, W;

  __device__ float operator()(int64_t m) const { return data[m / W / H * sn + m / W % H * sh + m % W * sw]; }
};

// One block per perturbation. Sums are in float64: each thread over its own elements, then over the block in a fixed
// order.
__global__ void channel_batch_norm_kernel(const float* delta, const int64_t* channel, const float* x,
                                          const double* mean, const double* var, const double* gamma, const float* y,
                                          float* out, double eps, int64_t N, int64_t H, int64_t W, int64_t xn,
                                          int64_t xc, int64_t xh, int64_t xw, int64_t yn, int64_t yc, int64_t yh,
                                          int64_t yw) {
  DZ_SHARED(double, part);
  const int64_t p = blockIdx.x, c = channel[p], M = N * H * W;
  const float* d = delta + p * M;
  const ChannelView z = {x + c * xc, xn, xh, xw, H, W};
  const double centre = mean[c], count = static_cast<double>(M);

  double sum = 0.0;
  for (int64_t m = threadIdx.x; m < M; m += blockDim.x) sum += d[m];
  const double mean_d = block_sum(sum, part) / count;

  sum = 0.0;
  for (int64_t m = threadIdx.x; m < M; m += blockDim.x) {
    const double zc = static_cast<float>(z(m) - centre), dzc = d[m] - mean_d;
    sum += dzc * (zc + zc + dzc);
  }
  const double dvar = block_sum(sum, part) / count;

  const double before = var[c] + eps;
  double after = before + dvar;
  if (after < before / 16) {  // four bits are lost: recompute the new variance from the perturbed values
    sum = 0.0;
    for (int64_t m = threadIdx.x; m < M; m += blockDim.x) {
      const double perturbed = static_cast<float>(z(m) - centre) + (d[m] - mean_d);
      sum += perturbed * perturbed;
    }
    after = block_sum(sum, part) / count + eps;
  }
  const double s = sqrt(before), t = sqrt(after);
  const double a = gamma[c] / t, b = gamma[c] * dvar / (s * t * (s + t));

  for (int64_t m = threadIdx.x; m < M; m += blockDim.x) {
    const float dy = static_cast<float>(a * (d[m] - mean_d) - b * static_cast<float>(z(m) - centre));
    float change = dy;
    if (y != nullptr) {  // max(y + dy, 0) - max(y, 0) without cancellation; NaN stays NaN
      const float base = ChannelView{y + c * yc, yn, yh, yw, H, W}(m);
      const float from_zero = base + dy < 0.0f ? 0.0f : base + dy;
      change = base > 0.0f ? (dy < -base ? -base : dy) : from_zero;
    }
    out[p * M + m] = change;
  }
}

}  // namespace dz

DZ_EXPORT int dz_channel_batch_norm(const float* delta, const int64_t* channel, const float* x, const double* mean,
                                    const double* var, const double* gamma, const float* y, float* out, double eps,
                                    int64_t P, int64_t N, int64_t H, int64_t W, int64_t xn, int64_t xc, int64_t xh,
                                    int64_t xw, int64_t yn, int64_t yc, int64_t yh, int64_t yw, cudaStream_t stream) {
  if (P * N * H * W == 0) return cudaSuccess;
  const unsigned threads = dz::block_of(512);
  return dz::launch(dz::channel_batch_norm_kernel, dim3(static_cast<unsigned>(P)), threads, threads * sizeof(double),
                    stream, delta, channel, x, mean, var, gamma, y, out, eps, N, H, W, xn, xc, xh, xw, yn, yc, yh, yw);
}
