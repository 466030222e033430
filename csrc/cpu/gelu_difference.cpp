#include "elementary.h"

namespace dz {
namespace {

// Terms of the Taylor series in d and the |d| up to which it is used; what is left out is below 6e-9 |d| there, for
// every z and both forms of the function.
constexpr int64_t kTerms = 8;
constexpr float kNear = 0.25f;
constexpr int64_t kTile = 512;  // base elements whose coefficients stay in L1 over the perturbations

// gelu(x) = max(x, 0) - t(x) with t(x) = |x| Phi(-|x|), for the tanh form |x| / (1 + exp(v(|x|))).
constexpr double kInvSqrt2Pi = 0.3989422804014327;
constexpr double kV1 = 1.5957691216057308, kV3 = kV1 * 0.044715;  // v(x) = kV1 x + kV3 x^3

struct Base {
  alignas(64) float term[kTerms][kTile];  // Taylor coefficients of gelu at z, from the first power on
  alignas(64) float z[kTile];
  alignas(64) float t[kTile];  // t(z)
};

// (x + 3) Phi(-x) / phi(x) as a polynomial in y = (x - 3) / (x + 3), 0 <= x <= 15, with a relative error of 9e-11.
DZ_INLINE Double8 mills_8(Double8 y) {
  Double8 f = Double8{} - 2.2031826897113847e-05;
  f = f * y - 2.9152940299406922e-05;
  f = f * y + 0.00016843781962652788;
  f = f * y + 0.00037650760293290455;
  f = f * y - 0.0006301951393846801;
  f = f * y - 0.002616163699218805;
  f = f * y + 0.0025728586437078955;
  f = f * y + 0.01747667246129319;
  f = f * y - 0.02622618801269794;
  f = f * y - 0.11847074665070713;
  f = f * y + 0.5765689055785872;
  f = f * y - 1.2767059489497459;
  return f * y + 1.82754179237969;
}

// The same with a relative error of 6e-8.
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

// Taylor coefficients of s at z, where gelu(x) = x s(x); t = |z| s(-|z|).
DZ_INLINE void series_erf(Double8 z, Double8* s, Double8& t) {
  const Double8 x = z < 0.0 ? -z : z;
  const Double8 r = 1.0 / (x + 3.0);
  Double8 phi = exp_8(-0.5 * x * x) * kInvSqrt2Pi;
  const Double8 tail = phi * mills_8((x - 3.0) * r) * r;
  t = x * tail;
  s[0] = z < 0.0 ? tail : 1.0 - tail;
  Double8 before = {};
  for (int64_t n = 0; n < kTerms; ++n) {  // phi'(x) = -x phi(x)
    const double share = 1.0 / static_cast<double>(n + 1);
    s[n + 1] = phi * share;
    const Double8 next = -(z * phi + before) * share;
    before = phi;
    phi = next;
  }
}

DZ_INLINE void series_tanh(Double8 z, Double8* s, Double8& t) {
  const Double8 x = z < 0.0 ? -z : z;
  const Double8 e = exp_8(-x * (kV1 + kV3 * x * x));
  const Double8 r = 1.0 / (1.0 + e);
  const Double8 v1 = kV1 + 3.0 * kV3 * z * z, v2 = 6.0 * kV3 * z;  // v3 = 3 kV3: coefficients of v'(z + d)
  t = x * e * r;
  s[0] = z < 0.0 ? e * r : r;
  const Double8 odd = z < 0.0 ? (1.0 - e) * r : (e - 1.0) * r;  // 1 - 2 s
  Double8 w[kTerms + 1];                                        // s (1 - s), with s' = s (1 - s) v'
  w[0] = e * r * r;
  for (int64_t n = 0; n < kTerms; ++n) {
    if (n > 0) {
      w[n] = odd * s[n];
      for (int64_t i = 1; i < n; ++i) w[n] -= s[i] * s[n - i];
    }
    Double8 next = w[n] * v1;
    if (n > 0) next += w[n - 1] * v2;
    if (n > 1) next += w[n - 2] * (3.0 * kV3);
    s[n + 1] = next * (1.0 / static_cast<double>(n + 1));
  }
}

template <bool kTanh>
void prepare(const float* from, int64_t size, Base& base) {
  const int64_t padded = ceil_div(size, kLanes < 8 ? 8 : kLanes) * (kLanes < 8 ? 8 : kLanes);
  for (int64_t i = 0; i < padded; ++i) base.z[i] = i < size ? from[i] : 0.0f;
  for (int64_t i = 0; i < padded; i += 8) {
    // Past 15 the function is max(x, 0) in float32.
    Double8 z = widen(load<Float8>(base.z + i)), s[kTerms + 1], t;
    z = z > 15.0 ? Double8{} + 15.0 : z;
    z = z < -15.0 ? Double8{} - 15.0 : z;
    if (kTanh) {
      series_tanh(z, s, t);
    } else {
      series_erf(z, s, t);
    }
    store(base.t + i, __builtin_convertvector(t, Float8));
    for (int64_t n = 0; n < kTerms; ++n) store(base.term[n] + i, __builtin_convertvector(z * s[n + 1] + s[n], Float8));
  }
}

// t(x) with an error below 2e-8; x of either sign.
template <bool kTanh>
DZ_INLINE Vec beyond_relu(Vec x) {
  x = at_most(absolute(x), Vec{} + 14.0f);
  if (kTanh) return x / (1.0f + exp_vec(x * (static_cast<float>(kV1) + static_cast<float>(kV3) * x * x)));
  const Vec r = 1.0f / (x + 3.0f);
  return x * (exp_vec(-0.5f * x * x) * static_cast<float>(kInvSqrt2Pi)) * (mills_vec((x - 3.0f) * r) * r);
}

DZ_INLINE Vec taylor(const Base& base, int64_t i, Vec d) {
  Vec q = load<Vec>(base.term[kTerms - 1] + i);
#pragma GCC unroll 8
  for (int64_t n = kTerms - 2; n >= 0; --n) q = q * d + load<Vec>(base.term[n] + i);
  return q * d;
}

// Any |d|: max(z + d, 0) - max(z, 0) by cases, minus t(z + d) - t(z); neither loses more than roundings of |d|.
template <bool kTanh>
DZ_INLINE Vec far(const Base& base, int64_t i, Vec d) {
  const Vec z = load<Vec>(base.z + i), moved = z + d;
  const Vec relu = z > 0.0f ? at_least(d, -z) : at_least(moved, Vec{});
  const Vec direct = relu - (beyond_relu<kTanh>(moved) - load<Vec>(base.t + i));
  return absolute(d) > kNear ? direct : taylor(base, i, d);
}

template <bool kTanh, typename In, typename Out>
void change(const Base& base, const In* d, Out* out, int64_t size) {
  const int64_t whole = size / kLanes * kLanes;
  Mask wide = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec v = load_vec(d + i);
    wide |= absolute(v) > kNear;
    store_vec(out + i, taylor(base, i, v));
  }
  const int64_t rest = size - whole;
  if (rest > 0) {
    const Vec v = load_some(d + whole, rest);
    wide |= absolute(v) > kNear;
    store_first(out + whole, taylor(base, whole, v), rest);
  }
  int32_t any = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) any |= wide[lane];
  if (any == 0) return;
  for (int64_t i = 0; i < whole; i += kLanes) store_vec(out + i, far<kTanh>(base, i, load_vec(d + i)));
  if (rest > 0) store_first(out + whole, far<kTanh>(base, whole, load_some(d + whole, rest)), rest);
}

template <bool kTanh, typename In, typename Out>
void all(const In* delta, const float* z, Out* out, int64_t P, int64_t S) {
  const int64_t tiles = ceil_div(S, kTile);
  // Each piece makes the coefficients of its tile; few tiles are split by perturbations as well. No element depends on
  // the split.
  const int64_t parts = lesser(P, ceil_div(4 * omp_get_max_threads(), tiles));
#pragma omp parallel
  {
    Base base;
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < tiles * parts; ++piece) {
      const int64_t first = piece / parts * kTile, size = lesser(kTile, S - first), part = piece % parts;
      prepare<kTanh>(z + first, size, base);
      for (int64_t p = part * P / parts; p < (part + 1) * P / parts; ++p)
        change<kTanh>(base, delta + p * S + first, out + p * S + first, size);
    }
  }
}

}  // namespace

void DZ_KERNEL(gelu_difference)(const void* delta, const float* z, void* out, int64_t P, int64_t S, bool tanh,
                                bool half, bool out_half) {
  if (P == 0 || S == 0) return;
  with_types(delta, half, out, out_half, [&](const auto* from, auto* to) {
    if (tanh) {
      all<true>(from, z, to, P, S);
    } else {
      all<false>(from, z, to, P, S);
    }
  });
}

}  // namespace dz
