#pragma once

#include "common.cuh"

namespace dz {

// One block per perturbation; each thread handles every blockDim.x-th sample. Formulas as in csrc/cpu/cross_entropy.h.
__global__ void cross_entropy_difference_kernel(const double* log_probs, const double* probs, const int64_t* target,
                                                const float* dlogits, double* out, int64_t N, int64_t K) {
  DZ_SHARED(double, part);
  const int64_t p = blockIdx.x;
  double total = 0.0;
  for (int64_t n = threadIdx.x; n < N; n += blockDim.x) {
    const float* d = dlogits + (p * N + n) * K;
    const double *log_p = log_probs + n * K, *prob = probs + n * K;
    const double at_target = d[target[n]];
    double top = 0.0, sum_expm1 = 0.0;
    for (int64_t k = 0; k < K; ++k) {
      const double e = d[k] - at_target;
      top = top < e ? e : top;
      sum_expm1 += prob[k] * expm1(e < 700.0 ? e : 700.0 + 0.0 * e);  // clamped to stay finite; NaN stays NaN
    }
    if (top <= 700.0 && sum_expm1 > -0.5) {
      total += log1p(sum_expm1);
      continue;
    }
    double shift = -HUGE_VAL, sum = 0.0;
    for (int64_t k = 0; k < K; ++k) {
      const double e = log_p[k] + (d[k] - at_target);
      shift = shift < e ? e : shift;
    }
    for (int64_t k = 0; k < K; ++k) sum += exp(log_p[k] + (d[k] - at_target) - shift);
    total += shift + log(sum);
  }
  const double sum = block_sum(total, part);
  if (threadIdx.x == 0) out[p] = sum / static_cast<double>(N);
}

}  // namespace dz

DZ_EXPORT int dz_cross_entropy_difference(const double* log_probs, const double* probs, const int64_t* target,
                                          const float* dlogits, double* out, int64_t P, int64_t N, int64_t K,
                                          cudaStream_t stream) {
  if (P == 0) return cudaSuccess;
  const unsigned threads = dz::block_of(128);
  return dz::launch(dz::cross_entropy_difference_kernel, dim3(static_cast<unsigned>(P)), threads,
                    threads * sizeof(double), stream, log_probs, probs, target, dlogits, out, N, K);
}
