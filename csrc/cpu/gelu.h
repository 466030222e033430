// The change of GELU. What depends on the base values alone is computed once for all perturbations.
#pragma once

#include "elementary.h"

namespace dz {
namespace {

// Terms of the Taylor series in d, and the largest |d| that each length is used for. The truncation error is below
// 6.5e-9 |d| for every z and both forms of GELU.
constexpr int64_t kTerms = 8, kFewTerms = 4;
constexpr float kNear = 0.25f, kNearer = 1.0f / 64;

// gelu(x) = max(x, 0) - t(x), where t(x) = |x| Phi(-|x|), or |x| / (1 + exp(v(|x|))) for the tanh form. t is bounded.
constexpr float kInvSqrt2Pi = 0.3989422804014327f;
constexpr float kV1 = 1.5957691216057308f, kV3 = kV1 * 0.044715f;  // v(x) = kV1 x + kV3 x^3

constexpr float kNoTail = 14.0f;  // for |x| above this, gelu(x) = max(x, 0) in float32

// What is precomputed for each of `stride` base values z: kRows rows, padded to full registers.
struct BaseTerms {
  static constexpr int64_t kRows = kTerms + 2;

  float* data;
  int64_t stride;
  float* term(int64_t n) const { return data + n * stride; }  // coefficient of d^(n + 1) in gelu(z + d)
  float* z() const { return data + kTerms * stride; }
  float* t() const { return data + (kTerms + 1) * stride; }  // t(z)
  BaseTerms from(int64_t i) const { return {data + i, stride}; }
};

// (x + 3) Phi(-x) / phi(x), a scaled Mills ratio, as a polynomial in y = (x - 3) / (x + 3) for 0 <= x <= 15. The
// relative error is 6e-8.
DZ_INLINE Vec mills_vec(Vec y) {
  Vec f = Vec{} - 0.0006889305993786182f;
  f = f * y - 0.0022846647937553957f;
  f = f * y + 0.002715177304339762f;
  f = f * y + 0.017372666988693858f;
  f = f * y - 0.026275161454274193f;
  f = f * y - 0.11845742920408049f;
  f = f * y + 0.5765737667442382f;
  f = f * y - 1.2767064929161114f;
  return f * y + 1.8275417218606647f;
}

// Taylor coefficients at z of s, where gelu(x) = x s(x); and t = |z| s(-|z|).
DZ_INLINE void series_erf(Vec z, Vec* s, Vec& t) {
  const Vec x = absolute(z), r = 1.0f / (x + 3.0f);
  Vec phi = x >= kNoTail ? Vec{} : exp_vec(-0.5f * x * x) * kInvSqrt2Pi;
  const Vec tail = phi * mills_vec((x - 3.0f) * r) * r;
  t = x * tail;
  s[0] = z < 0.0f ? tail : 1.0f - tail;
  Vec before = {};
#pragma GCC unroll 8
  for (int64_t n = 0; n < kTerms; ++n) {  // phi'(x) = -x phi(x)
    const float inverse = 1.0f / static_cast<float>(n + 1);
    s[n + 1] = phi * inverse;
    const Vec next = -(z * phi + before) * inverse;
    before = phi;
    phi = next;
  }
}

DZ_INLINE void series_tanh(Vec z, Vec* s, Vec& t) {
  const Vec x = absolute(z);
  const Vec e = x >= kNoTail ? Vec{} : exp_vec(-x * (kV1 + kV3 * x * x)), r = 1.0f / (1.0f + e);
  const Vec v1 = kV1 + 3.0f * kV3 * z * z, v2 = 6.0f * kV3 * z;  // coefficients of v'(z + d); the third is 3 kV3
  t = x * e * r;
  s[0] = z < 0.0f ? e * r : r;
  const Vec odd = z < 0.0f ? (1.0f - e) * r : (e - 1.0f) * r;  // 1 - 2 s
  Vec w[kTerms + 1];                                           // s (1 - s), with s' = s (1 - s) v'
  w[0] = e * r * r;
#pragma GCC unroll 8
  for (int64_t n = 0; n < kTerms; ++n) {
    if (n > 0) {
      w[n] = odd * s[n];
      for (int64_t i = 1; i < n; ++i) w[n] -= s[i] * s[n - i];
    }
    Vec next = w[n] * v1;
    if (n > 0) next += w[n - 1] * v2;
    if (n > 1) next += w[n - 2] * (3.0f * kV3);
    s[n + 1] = next * (1.0f / static_cast<float>(n + 1));
  }
}

// Precomputes for `size` base values, at most `stride`. Lanes past `size` in the last register are set to 0.
template <bool kTanh>
void prepare(const float* from, int64_t size, const BaseTerms& bases) {
  for (int64_t i = 0; i < size; i += kLanes) {
    Vec z = load_partial(from + i, min_of(kLanes, size - i)), s[kTerms + 1], t;
    store(bases.z() + i, z);
    z = at_most(at_least(z, Vec{} - kNoTail), Vec{} + kNoTail);
    if (kTanh) {
      series_tanh(z, s, t);
    } else {
      series_erf(z, s, t);
    }
    store(bases.t() + i, t);
    for (int64_t n = 0; n < kTerms; ++n) store(bases.term(n) + i, z * s[n + 1] + s[n]);
  }
}

// t(x) for x of either sign, with an error below 2e-8.
template <bool kTanh>
DZ_INLINE Vec gelu_tail(Vec x) {
  x = at_most(absolute(x), Vec{} + kNoTail);
  if (kTanh) return x / (1.0f + exp_vec(x * (kV1 + kV3 * x * x)));
  const Vec r = 1.0f / (x + 3.0f);
  return x * (exp_vec(-0.5f * x * x) * kInvSqrt2Pi) * (mills_vec((x - 3.0f) * r) * r);
}

template <int64_t kCount>
DZ_INLINE Vec taylor(const BaseTerms& bases, int64_t i, Vec d) {
  Vec q = load<Vec>(bases.term(kCount - 1) + i);
#pragma GCC unroll 8
  for (int64_t n = kCount - 2; n >= 0; --n) q = q * d + load<Vec>(bases.term(n) + i);
  return q * d;
}

// gelu(z + d) - gelu(z): a short or long Taylor series, and for |d| > kNear
//
//   (max(z + d, 0) - max(z, 0)) - (t(z + d) - t(z))
//
// with the first difference taken by cases. The errors are a few u |d|. The method is chosen per lane, so a
// result does not depend on its neighbours.
template <bool kTanh>
DZ_INLINE Vec change(const BaseTerms& bases, int64_t i, Vec d) {
  const Vec size = absolute(d), short_series = taylor<kFewTerms>(bases, i, d);
  if (!any(size > kNearer)) return short_series;
  const Vec series = size > kNearer ? taylor<kTerms>(bases, i, d) : short_series;
  if (!any(size > kNear)) return series;
  const Vec z = load<Vec>(bases.z() + i), perturbed = z + d;
  const Vec relu = z > 0.0f ? at_least(d, -z) : at_least(perturbed, Vec{});
  const Vec direct = relu - (gelu_tail<kTanh>(perturbed) - load<Vec>(bases.t() + i));
  return size > kNear ? direct : series;
}

// out may be d.
template <bool kTanh, typename In, typename Out>
void changes(const BaseTerms& bases, const In* d, Out* out, int64_t size) {
  const int64_t full = size / kLanes * kLanes;
  for (int64_t i = 0; i < full; i += kLanes) store_vec(out + i, change<kTanh>(bases, i, load_vec(d + i)));
  if (full < size)
    store_first(out + full, change<kTanh>(bases, full, load_partial(d + full, size - full)), size - full);
}

}  // namespace
}  // namespace dz
