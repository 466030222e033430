// Rows of a layer norm that move.
#pragma once

#include "elementary.h"

namespace dz {
namespace {

// v where the lane is below n, else 0.
DZ_INLINE Vec first(Vec v, int64_t n) {
  Mask lane;
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = static_cast<int32_t>(i);
  return lane < static_cast<int32_t>(n) ? v : Vec{};
}

Double8 sum_of(const float* d, int64_t M) {
  Double8 total = {};
  for (int64_t i = 0; i < M;) {
    Vec part = {};
    const int64_t end = lesser(M, i + kLaneTerms * kLanes);
    for (; i + kLanes <= end; i += kLanes) part += load<Vec>(d + i);
    if (i < end) {
      part += load_some(d + i, end - i);
      i = end;
    }
    total += widen_sum(part);
  }
  return total;
}

// Sums of e, (zc + e)^2 and e (2 zc + e), e = d - shift, for the rows of one call, each in eight parts.
struct Moments {
  Double8 e[kTogether] = {}, moved[kTogether] = {}, change[kTogether] = {};
};

struct Parts {
  Vec e = {}, moved = {}, change = {};
  DZ_INLINE void add(Vec e_, Vec z) {
    const Vec w = z + e_;
    e += e_;
    moved += w * w;
    change += e_ * (z + w);
  }
};

void moments(const float* d, const float* zc, float shift, int64_t M, Moments& to, int64_t row) {
  Double8 e = {}, moved = {}, change = {};
  for (int64_t i = 0; i < M;) {
    Parts part;
    const int64_t end = lesser(M, i + kLaneTerms * kLanes);
    for (; i + kLanes <= end; i += kLanes) part.add(load<Vec>(d + i) - shift, load<Vec>(zc + i));
    if (i < end) {
      part.add(first(load_some(d + i, end - i) - shift, end - i), load_some(zc + i, end - i));
      i = end;
    }
    e += widen_sum(part.e);
    moved += widen_sum(part.moved);
    change += widen_sum(part.change);
  }
  to.e[row] = e, to.moved[row] = moved, to.change[row] = change;
}

// out = gamma (a (d - shift - rest) - b zc)
template <bool kGamma, typename Out>
void normalise(const float* d, const float* zc, const float* gamma, Out* out, float shift, float rest, float a, float b,
               int64_t M) {
  int64_t i = 0;
  for (; i + kLanes <= M; i += kLanes) {
    const Vec y = a * ((load<Vec>(d + i) - shift) - rest) - b * load<Vec>(zc + i);
    store_vec(out + i, kGamma ? load<Vec>(gamma + i) * y : y);
  }
  if (i < M) {
    const int64_t n = M - i;
    const Vec y = a * ((load_some(d + i, n) - shift) - rest) - b * load_some(zc + i, n);
    store_first(out + i, kGamma ? load_some(gamma + i, n) * y : y, n);
  }
}

const float* as_floats(const float* from, float*, int64_t) { return from; }

const float* as_floats(const Bf16* from, float* to, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load_vec(from + i));
  if (i < size) store_some(to + i, load_some(from + i, size - i), size - i);
  return to;
}

// Up to kTogether rows of d, with zc and var of theirs; `to` has its rows `to_row` apart. The mean is taken in two
// rounds, sum(d) and then the sum of what is left of d, so that a constant d gives 0. The new variance is always the
// mean of (zc + dzc)^2, which cannot cancel as var + dvar would. `wide` holds bfloat16 rows in float32, as they are
// read three times.
template <typename In, typename Out>
void norm_rows(const In* delta, float* wide, const float* z, const double* var, const float* gamma, Out* to,
               int64_t to_row, double eps, int64_t count, int64_t M, bool centre) {
  const double size = static_cast<double>(M);
  const float* d = as_floats(delta, wide, count * M);
  float shift[kTogether] = {}, rest[kTogether], a[kTogether], b[kTogether];
  if (centre) {
    Double8 sums[kTogether] = {};
    for (int64_t i = 0; i < count; ++i) sums[i] = sum_of(d + i * M, M);
    store(shift, __builtin_convertvector(totals_of(sums) / size, Float8));
  }
  Moments sums;
  for (int64_t i = 0; i < count; ++i) moments(d + i * M, z + i * M, shift[i], M, sums, i);
  const Double8 left = centre ? totals_of(sums.e) / size : Double8{};
  const Double8 moved = totals_of(sums.moved) / size - left * left, dvar = totals_of(sums.change) / size - left * left;
  Double8 s = {}, t = {};
  for (int64_t i = 0; i < count; ++i) {
    s[i] = __builtin_sqrt(var[i] + eps);
    t[i] = __builtin_sqrt((moved[i] < 0.0 ? 0.0 : moved[i]) + eps);
  }
  store(rest, __builtin_convertvector(left, Float8));
  store(a, __builtin_convertvector(1.0 / t, Float8));
  store(b, __builtin_convertvector(dvar / (s * t * (s + t)), Float8));
  for (int64_t i = 0; i < count; ++i) {
    if (gamma != nullptr) {
      normalise<true>(d + i * M, z + i * M, gamma, to + i * to_row, shift[i], rest[i], a[i], b[i], M);
    } else {
      normalise<false>(d + i * M, z + i * M, nullptr, to + i * to_row, shift[i], rest[i], a[i], b[i], M);
    }
  }
}

}  // namespace
}  // namespace dz
