#include <cmath>

#include "elementary.h"

namespace dz {
namespace {

constexpr int64_t kRun = 8;        // float32 terms that a lane adds before the sum goes on in float64
constexpr int64_t kTogether = 8;   // rows whose logarithms and divisions overlap
constexpr int64_t kTile = 8192;    // elements of p that stay in cache over the perturbations
constexpr float kLargest = 60.0f;  // exp of more would come close to infinity

DZ_INLINE double log1p_of(double x) {
  if (x < 1e-3 && x > -1e-3)  // what is left out is below 2e-16 of it
    return x * (1.0 - x * (1.0 / 2 - x * (1.0 / 3 - x * (1.0 / 4 - x * (1.0 / 5)))));
  return log1p(x);
}

// What has no probability has no say, whatever its d.
DZ_INLINE Vec counted(Vec d, Vec p) { return p == 0.0f ? Vec{} : d; }

// exp(d) - 1, infinite past kLargest.
DZ_INLINE Vec growth(Vec d) { return d > kLargest ? Vec{} + HUGE_VALF : expm1_vec(d); }

// sum_k p_k expm1(d_k) = exp(m) - 1; infinite where a d_k is past kLargest. Also leaves expm1(d) in `change`.
template <bool kKeep>
double sum_of(const float* d, const float* p, float* change, int64_t K) {
  Double8 total = {};
  for (int64_t i = 0; i < K;) {
    Vec part = {};
    const int64_t end = lesser(K, i + kRun * kLanes);
    for (; i + kLanes <= end; i += kLanes) {
      const Vec prob = load<Vec>(p + i), e = growth(counted(load<Vec>(d + i), prob));
      part += prob * e;
      if (kKeep) store(change + i, e);
    }
    if (i < end) {
      const int64_t n = end - i;
      const Vec prob = load_some(p + i, n), e = growth(counted(load_some(d + i, n), prob));
      part += prob * e;
      if (kKeep) store_some(change + i, e, n);
      i = end;
    }
    total += widen_sum(part);
  }
  return total_of(total);
}

struct Shift {
  double top, rest;  // m = top + rest, kept apart: top may be so large that rest would drown
};

// log(sum_k p_k exp(d_k) / sum_k p_k) where the sum is far from 1.
Shift far_shift(const float* d, const float* p, int64_t K) {
  double top = -HUGE_VAL, total = 0.0, before = 0.0;
  for (int64_t k = 0; k < K; ++k) top = p[k] > 0.0f && top < d[k] ? d[k] : top;
  for (int64_t k = 0; k < K; ++k) {
    before += p[k];
    total += p[k] == 0.0f ? 0.0 : p[k] * exp(d[k] - top);
  }
  return {top, log(total / before)};
}

// out = p expm1(d - m) with expm1(d - m) = (expm1(d) - moved) / (1 + moved); out holds expm1(d).
void finish(const float* p, float* out, double moved, int64_t K) {
  const float shift = static_cast<float>(moved), scale = static_cast<float>(1.0 / (1.0 + moved));
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) store(out + k, load<Vec>(p + k) * ((load<Vec>(out + k) - shift) * scale));
  if (k < K) store_some(out + k, load_some(p + k, K - k) * ((load_some(out + k, K - k) - shift) * scale), K - k);
}

void finish_far(const float* d, const float* p, float* out, int64_t K) {
  const Shift m = far_shift(d, p, K);
  for (int64_t k = 0; k < K; ++k)
    out[k] = p[k] == 0.0f ? 0.0f : static_cast<float>(p[k] * expm1((d[k] - m.top) - m.rest));
}

void subtract(const float* d, float m, float* out, int64_t K) {
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) store(out + k, load<Vec>(d + k) - m);
  if (k < K) store_some(out + k, load_some(d + k, K - k) - m, K - k);
}

void subtract_far(const float* d, const float* p, float* out, int64_t K) {
  const Shift m = far_shift(d, p, K);
  for (int64_t k = 0; k < K; ++k) out[k] = static_cast<float>((d[k] - m.top) - m.rest);
}

}  // namespace

void DZ_KERNEL(softmax_difference)(const float* delta, const float* p, float* out, int64_t P, int64_t R, int64_t K,
                                   bool log) {
  if (K == 0) return;
  const int64_t rows = greater(1, lesser(R, kTile / K)), tiles = ceil_div(R, rows);
  const int64_t together = greater(1, lesser(kTogether, kTile / 4 / K));  // they stay in L1
#pragma omp parallel for schedule(static)
  for (int64_t piece = 0; piece < tiles * P; ++piece) {
    const int64_t start = piece / P * rows, at = piece % P;
    const int64_t stop = lesser(R, start + rows);
    for (int64_t r = start; r < stop; r += together) {
      const int64_t count = lesser(together, stop - r);
      const float *d = delta + (at * R + r) * K, *prob = p + r * K;
      float* to = out + (at * R + r) * K;
      double moved[kTogether];
      for (int64_t i = 0; i < count; ++i) {
        moved[i] = log ? sum_of<false>(d + i * K, prob + i * K, nullptr, K)
                       : sum_of<true>(d + i * K, prob + i * K, to + i * K, K);
      }
      for (int64_t i = 0; i < count; ++i) {
        const bool near = moved[i] > -0.5 && moved[i] < HUGE_VAL;  // not so for NaN
        if (near && log) {
          subtract(d + i * K, static_cast<float>(log1p_of(moved[i])), to + i * K, K);
        } else if (near) {
          finish(prob + i * K, to + i * K, moved[i], K);
        } else if (log) {
          subtract_far(d + i * K, prob + i * K, to + i * K, K);
        } else {
          finish_far(d + i * K, prob + i * K, to + i * K, K);
        }
      }
    }
  }
}

}  // namespace dz
