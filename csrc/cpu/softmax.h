// The change of softmax, row by row: d is the change of the logits, p the base probabilities, K the length of a row.
//
//   m = log(sum_k p_k exp(d_k))          sum_expm1 = exp(m) - 1 = sum_k p_k expm1(d_k)
//   change of softmax = p expm1(d - m)   change of log-softmax = d - m
#pragma once

#include <cmath>

#include "elementary.h"

namespace dz {
namespace {

constexpr float kLargest = 60.0f;  // exp of more would come close to overflow
constexpr float kSmall = 0.34f;    // exp of less needs no range reduction

DZ_INLINE double log1p_of(double x) {
  if (x < 1e-3 && x > -1e-3)  // the truncation error is below 2e-16 of the result
    return x * (1.0 - x * (1.0 / 2 - x * (1.0 / 3 - x * (1.0 / 4 - x * (1.0 / 5)))));
  return log1p(x);
}

// Where p is 0 the value of d must not matter, even if it is infinite.
DZ_INLINE Vec masked(Vec d, Vec p) { return p == 0.0f ? Vec{} : d; }

// exp(d) - 1; infinite for d > kLargest.
DZ_INLINE Vec expm1_or_inf(Vec d) { return d > kLargest ? Vec{} + HUGE_VALF : expm1_vec(d); }

// The sum over one run, which leaves expm1(d) in `change` with kStore. kNear promises |d| <= kSmall: the same bits in
// less time.
template <bool kStore, bool kNear>
DZ_INLINE Vec sum_of_run(const float* d, const float* p, float* change, int64_t count) {
  Vec part = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec prob = load<Vec>(p + i), logit = masked(load<Vec>(d + i), prob);
    const Vec e = kNear ? expm1_near(logit) : expm1_or_inf(logit);
    part += prob * e;
    if (kStore) store(change + i, e);
  }
  if (i < count) {
    const Vec prob = load_partial(p + i, count - i), logit = masked(load_partial(d + i, count - i), prob);
    const Vec e = kNear ? expm1_near(logit) : expm1_or_inf(logit);
    part += prob * e;
    if (kStore) store_partial(change + i, e, count - i);
  }
  return part;
}

// sum_expm1; infinite if a d_k is above kLargest. With kStore also writes expm1(d) to `change`.
template <bool kStore>
double sum_of(const float* d, const float* p, float* change, int64_t K) {
  Double8 total = {};
  for (int64_t i = 0; i < K; i += kLaneTerms * kLanes) {
    const int64_t end = min_of(K, i + kLaneTerms * kLanes);
    Mask large = {};
    int64_t j = i;
    for (; j + kLanes <= end; j += kLanes) large |= absolute(load<Vec>(d + j)) > kSmall;
    if (j < end) large |= absolute(load_partial(d + j, end - j)) > kSmall;
    float* to = kStore ? change + i : nullptr;
    total += widen_sum(any(large) ? sum_of_run<kStore, false>(d + i, p + i, to, end - i)
                                  : sum_of_run<kStore, true>(d + i, p + i, to, end - i));
  }
  return total_of(total);
}

struct Shift {
  double top, rest;  // m = top + rest, not added: rest would be lost beside a large top
};

// log(sum_k p_k exp(d_k) / sum_k p_k), for sums far from 1.
Shift far_shift(const float* d, const float* p, int64_t K) {
  double top = -HUGE_VAL, total = 0.0, before = 0.0;
  for (int64_t k = 0; k < K; ++k) top = p[k] > 0.0f && top < d[k] ? d[k] : top;
  for (int64_t k = 0; k < K; ++k) {
    before += p[k];
    total += p[k] == 0.0f ? 0.0 : p[k] * exp(d[k] - top);
  }
  return {top, log(total / before)};
}

// Whether the formulas in sum_expm1 are accurate; otherwise, and for NaN, the float64 path runs.
DZ_INLINE bool near(double sum_expm1) { return sum_expm1 > -0.5 && sum_expm1 < HUGE_VAL; }

// out = p expm1(d - m) as p (expm1(d) - sum_expm1) / (1 + sum_expm1), where out holds expm1(d). With kAfter also
// after = p + out.
template <bool kAfter>
void finish(const float* p, float* out, float* after, double sum_expm1, int64_t K) {
  const float shift = static_cast<float>(sum_expm1), scale = static_cast<float>(1.0 / (1.0 + sum_expm1));
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    const Vec prob = load<Vec>(p + k), change = prob * ((load<Vec>(out + k) - shift) * scale);
    store(out + k, change);
    if (kAfter) store(after + k, prob + change);
  }
  if (k < K) {
    const Vec prob = load_partial(p + k, K - k), change = prob * ((load_partial(out + k, K - k) - shift) * scale);
    store_partial(out + k, change, K - k);
    if (kAfter) store_partial(after + k, prob + change, K - k);
  }
}

template <bool kAfter>
void finish_far(const float* d, const float* p, float* out, float* after, int64_t K) {
  const Shift m = far_shift(d, p, K);
  for (int64_t k = 0; k < K; ++k) {
    out[k] = p[k] == 0.0f ? 0.0f : static_cast<float>(p[k] * expm1((d[k] - m.top) - m.rest));
    if (kAfter) after[k] = p[k] + out[k];
  }
}

// out = p expm1(d - m) for at most kRowBatch rows. With kAfter also after = p + out, with the row stride of d; it may
// overwrite d.
template <bool kAfter>
void softmax_rows(const float* d, int64_t d_row, const float* p, float* out, int64_t out_row, float* after,
                  int64_t count, int64_t K) {
  double sum_expm1[kRowBatch];
  for (int64_t i = 0; i < count; ++i) sum_expm1[i] = sum_of<true>(d + i * d_row, p + i * K, out + i * out_row, K);
  for (int64_t i = 0; i < count; ++i) {
    float* next = kAfter ? after + i * d_row : nullptr;
    if (near(sum_expm1[i])) {
      finish<kAfter>(p + i * K, out + i * out_row, next, sum_expm1[i], K);
    } else {
      finish_far<kAfter>(d + i * d_row, p + i * K, out + i * out_row, next, K);
    }
  }
}

}  // namespace
}  // namespace dz
