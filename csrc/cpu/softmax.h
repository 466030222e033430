// Rows of softmax that move: d is the change of the logits, p the base probabilities, K the length of a row.
#pragma once

#include <cmath>

#include "elementary.h"

namespace dz {
namespace {

constexpr float kLargest = 60.0f;  // exp of more would come close to infinity
constexpr float kSmall = 0.34f;    // exp of less needs no reduction

DZ_INLINE double log1p_of(double x) {
  if (x < 1e-3 && x > -1e-3)  // what is left out is below 2e-16 of it
    return x * (1.0 - x * (1.0 / 2 - x * (1.0 / 3 - x * (1.0 / 4 - x * (1.0 / 5)))));
  return log1p(x);
}

// What has no probability has no say, whatever its d.
DZ_INLINE Vec counted(Vec d, Vec p) { return p == 0.0f ? Vec{} : d; }

// exp(d) - 1, infinite past kLargest.
DZ_INLINE Vec growth(Vec d) { return d > kLargest ? Vec{} + HUGE_VALF : expm1_vec(d); }

// One run. kNear: every |d| is at most kSmall, which gives the same bits in less time.
template <bool kKeep, bool kNear>
DZ_INLINE Vec sum_of_run(const float* d, const float* p, float* change, int64_t count) {
  Vec part = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec prob = load<Vec>(p + i), logit = counted(load<Vec>(d + i), prob);
    const Vec e = kNear ? expm1_near(logit) : growth(logit);
    part += prob * e;
    if (kKeep) store(change + i, e);
  }
  if (i < count) {
    const Vec prob = load_some(p + i, count - i), logit = counted(load_some(d + i, count - i), prob);
    const Vec e = kNear ? expm1_near(logit) : growth(logit);
    part += prob * e;
    if (kKeep) store_some(change + i, e, count - i);
  }
  return part;
}

// sum_k p_k expm1(d_k) = exp(m) - 1; infinite where a d_k is past kLargest. Also leaves expm1(d) in `change`.
template <bool kKeep>
double sum_of(const float* d, const float* p, float* change, int64_t K) {
  Double8 total = {};
  for (int64_t i = 0; i < K; i += kLaneTerms * kLanes) {
    const int64_t end = lesser(K, i + kLaneTerms * kLanes);
    Mask large = {};
    int64_t j = i;
    for (; j + kLanes <= end; j += kLanes) large |= absolute(load<Vec>(d + j)) > kSmall;
    if (j < end) large |= absolute(load_some(d + j, end - j)) > kSmall;
    float* to = kKeep ? change + i : nullptr;
    total += widen_sum(any(large) ? sum_of_run<kKeep, false>(d + i, p + i, to, end - i)
                                  : sum_of_run<kKeep, true>(d + i, p + i, to, end - i));
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

// Whether moved is in the range of the form that takes expm1 of each d; not so for NaN.
DZ_INLINE bool near(double moved) { return moved > -0.5 && moved < HUGE_VAL; }

// out = p expm1(d - m) with expm1(d - m) = (expm1(d) - moved) / (1 + moved); out holds expm1(d). With kAfter also
// after = p + out.
template <bool kAfter>
void finish(const float* p, float* out, float* after, double moved, int64_t K) {
  const float shift = static_cast<float>(moved), scale = static_cast<float>(1.0 / (1.0 + moved));
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    const Vec prob = load<Vec>(p + k), change = prob * ((load<Vec>(out + k) - shift) * scale);
    store(out + k, change);
    if (kAfter) store(after + k, prob + change);
  }
  if (k < K) {
    const Vec prob = load_some(p + k, K - k), change = prob * ((load_some(out + k, K - k) - shift) * scale);
    store_some(out + k, change, K - k);
    if (kAfter) store_some(after + k, prob + change, K - k);
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

// out = p expm1(d - m) for at most kTogether rows. With kAfter also after = p + out, whose rows are as far apart as
// those of d, which it may replace.
template <bool kAfter>
void softmax_rows(const float* d, int64_t d_row, const float* p, float* out, int64_t out_row, float* after,
                  int64_t count, int64_t K) {
  double moved[kTogether];
  for (int64_t i = 0; i < count; ++i) moved[i] = sum_of<true>(d + i * d_row, p + i * K, out + i * out_row, K);
  for (int64_t i = 0; i < count; ++i) {
    float* next = kAfter ? after + i * d_row : nullptr;
    if (near(moved[i])) {
      finish<kAfter>(p + i * K, out + i * out_row, next, moved[i], K);
    } else {
      finish_far<kAfter>(d + i * d_row, p + i * K, out + i * out_row, next, K);
    }
  }
}

}  // namespace
}  // namespace dz
