#include <cmath>

#include "elementary.h"

namespace dz {
namespace {

constexpr int64_t kRun = 8;        // float32 terms that a lane adds before the sum goes on in float64
constexpr int64_t kTile = 8192;    // elements of p that stay in cache over the perturbations
constexpr float kLargest = 60.0f;  // exp of more would come close to infinity

DZ_INLINE double log1p_of(double x) {
  if (x < 1e-3 && x > -1e-3)  // what is left out is below 2e-16 of it
    return x * (1.0 - x * (1.0 / 2 - x * (1.0 / 3 - x * (1.0 / 4 - x * (1.0 / 5)))));
  return log1p(x);
}

struct Row {
  double moved;  // sum_k p_k expm1(d_k) = exp(m) - 1
  float top;     // the largest d_k where p_k > 0, at least 0
};

// What has no probability has no say, whatever its d.
DZ_INLINE Vec counted(Vec d, Vec p) { return p == 0.0f ? Vec{} : d; }

// Also leaves expm1(d) in `change` unless that is null.
Row sum_of(const float* d, const float* p, float* change, int64_t K) {
  Double8 total = {};
  Vec top = {};
  for (int64_t i = 0; i < K;) {
    Vec part = {};
    const int64_t end = lesser(K, i + kRun * kLanes);
    for (; i + kLanes <= end; i += kLanes) {
      const Vec prob = load<Vec>(p + i), v = counted(load<Vec>(d + i), prob), e = expm1_vec(v);
      top = top < v ? v : top;
      part += prob * e;
      if (change != nullptr) store(change + i, e);
    }
    if (i < end) {
      const int64_t n = end - i;
      const Vec prob = load_some(p + i, n), v = counted(load_some(d + i, n), prob), e = expm1_vec(v);
      top = top < v ? v : top;
      part += prob * e;
      if (change != nullptr) store_some(change + i, e, n);
      i = end;
    }
    total += widen_sum(part);
  }
  float most = 0.0f;
  for (int64_t lane = 0; lane < kLanes; ++lane) most = most < top[lane] ? top[lane] : most;
  return {sum(total), most};
}

// log(sum_k p_k exp(d_k)) where the sum is far from 1.
double far_shift(const float* d, const float* p, int64_t K) {
  double top = -HUGE_VAL, total = 0.0;
  for (int64_t k = 0; k < K; ++k) top = p[k] > 0.0f && top < d[k] ? d[k] : top;
  for (int64_t k = 0; k < K; ++k) total += p[k] == 0.0f ? 0.0 : p[k] * exp(d[k] - top);
  return top + log(total);
}

// out = p expm1(d - m) with expm1(d - m) = (expm1(d) - moved) / (1 + moved); out holds expm1(d).
void finish(const float* p, float* out, double moved, int64_t K) {
  const float shift = static_cast<float>(moved), scale = static_cast<float>(1.0 / (1.0 + moved));
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) store(out + k, load<Vec>(p + k) * ((load<Vec>(out + k) - shift) * scale));
  if (k < K) store_some(out + k, load_some(p + k, K - k) * ((load_some(out + k, K - k) - shift) * scale), K - k);
}

void subtract(const float* d, double shift, float* out, int64_t K) {
  const float m = static_cast<float>(shift);
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) store(out + k, load<Vec>(d + k) - m);
  if (k < K) store_some(out + k, load_some(d + k, K - k) - m, K - k);
}

}  // namespace

void DZ_KERNEL(softmax_difference)(const float* delta, const float* p, float* out, int64_t P, int64_t R, int64_t K,
                                   bool log) {
  if (K == 0) return;
  const int64_t rows = greater(1, lesser(R, kTile / K)), tiles = ceil_div(R, rows);
#pragma omp parallel for schedule(static)
  for (int64_t piece = 0; piece < tiles * P; ++piece) {
    const int64_t start = piece / P * rows, at = piece % P;
    for (int64_t r = start; r < lesser(R, start + rows); ++r) {
      const float *d = delta + (at * R + r) * K, *prob = p + r * K;
      float* to = out + (at * R + r) * K;
      const Row row = sum_of(d, prob, log ? nullptr : to, K);
      const bool near = row.top <= kLargest && row.moved > -0.5;  // not so for NaN
      if (log) {
        subtract(d, near ? log1p_of(row.moved) : far_shift(d, prob, K), to, K);
      } else if (near) {
        finish(prob, to, row.moved, K);
      } else {
        const double m = far_shift(d, prob, K);
        for (int64_t k = 0; k < K; ++k) to[k] = prob[k] == 0.0f ? 0.0f : static_cast<float>(prob[k] * expm1(d[k] - m));
      }
    }
  }
}

}  // namespace dz
