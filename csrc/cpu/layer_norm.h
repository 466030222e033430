// The change of a layer norm's output, row by row.
#pragma once

#include "elementary.h"

namespace dz {
namespace {

// v in the first n lanes, 0 in the others.
DZ_INLINE Vec first(Vec v, int64_t n) {
  Mask lane;
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = static_cast<int32_t>(i);
  return lane < static_cast<int32_t>(n) ? v : Vec{};
}

Double8 sum_of(const float* d, int64_t M) {
  Double8 total = {};
  for (int64_t i = 0; i < M;) {
    Vec part = {};
    const int64_t end = min_of(M, i + kLaneTerms * kLanes);
    for (; i + kLanes <= end; i += kLanes) part += load<Vec>(d + i);
    if (i < end) {
      part += load_partial(d + i, end - i);
      i = end;
    }
    total += widen_sum(part);
  }
  return total;
}

// Sums of e = d - shift, of (zc + e)^2 and of e (2 zc + e) for a batch of rows, each in eight lanes.
struct Moments {
  Double8 e[kRowBatch] = {}, squares[kRowBatch] = {}, change[kRowBatch] = {};
};

struct LaneSums {
  Vec e = {}, squares = {}, change = {};
  DZ_INLINE void add(Vec e_, Vec z) {
    const Vec w = z + e_;
    e += e_;
    squares += w * w;
    change += e_ * (z + w);
  }
};

void moments(const float* d, const float* zc, float shift, int64_t M, Moments& to, int64_t row) {
  Double8 e = {}, squares = {}, change = {};
  for (int64_t i = 0; i < M;) {
    LaneSums part;
    const int64_t end = min_of(M, i + kLaneTerms * kLanes);
    for (; i + kLanes <= end; i += kLanes) part.add(load<Vec>(d + i) - shift, load<Vec>(zc + i));
    if (i < end) {
      part.add(first(load_partial(d + i, end - i) - shift, end - i), load_partial(zc + i, end - i));
      i = end;
    }
    e += widen_sum(part.e);
    squares += widen_sum(part.squares);
    change += widen_sum(part.change);
  }
  to.e[row] = e, to.squares[row] = squares, to.change[row] = change;
}

// out = gamma (a ((d - shift) - mean_e) - b zc)
template <bool kGamma, typename Out>
void normalise(const float* d, const float* zc, const float* gamma, Out* out, float shift, float mean_e, float a,
               float b, int64_t M) {
  int64_t i = 0;
  for (; i + kLanes <= M; i += kLanes) {
    const Vec y = a * ((load<Vec>(d + i) - shift) - mean_e) - b * load<Vec>(zc + i);
    store_vec(out + i, kGamma ? load<Vec>(gamma + i) * y : y);
  }
  if (i < M) {
    const int64_t n = M - i;
    const Vec y = a * ((load_partial(d + i, n) - shift) - mean_e) - b * load_partial(zc + i, n);
    store_first(out + i, kGamma ? load_partial(gamma + i, n) * y : y, n);
  }
}

const float* as_floats(const float* from, float*, int64_t) { return from; }

const float* as_floats(const Bf16* from, float* to, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load_vec(from + i));
  if (i < size) store_partial(to + i, load_partial(from + i, size - i), size - i);
  return to;
}

// The change of layer norm for up to kRowBatch rows; `to` has a row stride of to_row.
//
// The mean of d is shift + mean_e: shift is the float32 mean, and mean_e the mean of d - shift. A constant d therefore
// gives exactly 0. The new variance is always the mean of (zc + d - mean)^2; var + dvar could cancel. bfloat16 rows are
// converted to `floats` once, because they are read three times.
template <typename In, typename Out>
void norm_rows(const In* delta, float* floats, const float* z, const double* var, const float* gamma, Out* to,
               int64_t to_row, double eps, int64_t count, int64_t M, bool centre) {
  const double size = static_cast<double>(M);
  const float* d = as_floats(delta, floats, count * M);
  float shift[kRowBatch] = {}, mean_e32[kRowBatch], a[kRowBatch], b[kRowBatch];
  if (centre) {
    Double8 sums[kRowBatch] = {};
    for (int64_t i = 0; i < count; ++i) sums[i] = sum_of(d + i * M, M);
    store(shift, __builtin_convertvector(totals_of(sums) / size, Float8));
  }
  Moments sums;
  for (int64_t i = 0; i < count; ++i) moments(d + i * M, z + i * M, shift[i], M, sums, i);
  const Double8 mean_e = centre ? totals_of(sums.e) / size : Double8{};
  const Double8 new_var = totals_of(sums.squares) / size - mean_e * mean_e,
                dvar = totals_of(sums.change) / size - mean_e * mean_e;
  Double8 s = {}, t = {};
  for (int64_t i = 0; i < count; ++i) {
    s[i] = __builtin_sqrt(var[i] + eps);
    t[i] = __builtin_sqrt((new_var[i] < 0.0 ? 0.0 : new_var[i]) + eps);
  }
  store(mean_e32, __builtin_convertvector(mean_e, Float8));
  store(a, __builtin_convertvector(1.0 / t, Float8));
  store(b, __builtin_convertvector(dvar / (s * t * (s + t)), Float8));
  for (int64_t i = 0; i < count; ++i) {
    if (gamma != nullptr) {
      normalise<true>(d + i * M, z + i * M, gamma, to + i * to_row, shift[i], mean_e32[i], a[i], b[i], M);
    } else {
      normalise<false>(d + i * M, z + i * M, nullptr, to + i * to_row, shift[i], mean_e32[i], a[i], b[i], M);
    }
  }
}

}  // namespace
}  // namespace dz
