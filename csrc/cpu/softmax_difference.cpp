#include "softmax.h"

namespace dz {
namespace {

constexpr int64_t kTile = 8192;  // elements of p per tile: they stay in cache for all perturbations

void subtract(const float* d, float m, float* out, int64_t K) {
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) store(out + k, load<Vec>(d + k) - m);
  if (k < K) store_partial(out + k, load_partial(d + k, K - k) - m, K - k);
}

void subtract_far(const float* d, const float* p, float* out, int64_t K) {
  const Shift m = far_shift(d, p, K);
  for (int64_t k = 0; k < K; ++k) out[k] = static_cast<float>((d[k] - m.top) - m.rest);
}

}  // namespace

DZ_KERNEL(softmax_difference, (const float* delta,  // [P, R, K]
                               const float* p,      // [R, K]
                               float* out,          // [P, R, K]
                               int64_t P, int64_t R, int64_t K, bool log)) {
  if (K == 0) return;
  const int64_t rows = max_of(1, min_of(R, kTile / K)), tiles = ceil_div(R, rows);
  const int64_t batch = max_of(1, min_of(kRowBatch, kTile / 4 / K));  // a batch stays in L1
#pragma omp parallel for schedule(static)
  for (int64_t piece = 0; piece < tiles * P; ++piece) {
    const int64_t start = piece / P * rows, at = piece % P;
    const int64_t stop = min_of(R, start + rows);
    for (int64_t r = start; r < stop; r += batch) {
      const int64_t count = min_of(batch, stop - r);
      const float *d = delta + (at * R + r) * K, *prob = p + r * K;
      float* to = out + (at * R + r) * K;
      if (!log) {
        softmax_rows<false>(d, K, prob, to, K, nullptr, count, K);
        continue;
      }
      double sum_expm1[kRowBatch];
      for (int64_t i = 0; i < count; ++i) sum_expm1[i] = sum_of<false>(d + i * K, prob + i * K, nullptr, K);
      for (int64_t i = 0; i < count; ++i) {
        if (near(sum_expm1[i])) {
          subtract(d + i * K, static_cast<float>(log1p_of(sum_expm1[i])), to + i * K, K);
        } else {
          subtract_far(d + i * K, prob + i * K, to + i * K, K);
        }
      }
    }
  }
}

}  // namespace dz
