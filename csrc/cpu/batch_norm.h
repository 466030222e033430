// Batch norm of a difference: the sums that its new statistics need, its coefficients, and the ReLU after it.
#pragma once

#include "elementary.h"

namespace dz {
namespace {

// The sums of e = d - shift, e^2 and zc e in each lane. With zc, the centred base input of the norm, they give the mean
// and the variance of zc + d; a shift near the mean of d keeps them from cancelling.
struct LaneSums {
  Vec e = {}, e2 = {}, ze = {};

  DZ_INLINE void add(Vec e_, Vec zc) {
    e += e_;
    e2 += e_ * e_;
    ze += e_ * zc;
  }
};

// The same sums over one channel.
struct Moments {
  double e, e2, ze;

  Moments& operator+=(const Moments& other) {
    e += other.e, e2 += other.e2, ze += other.ze;
    return *this;
  }
};

// The part of the old variance below which the new one is taken from the perturbed values themselves: the old one and
// its change have cancelled, and four bits are gone.
constexpr double kCancelled = 1.0 / 16;

// The change of the norm's output, scale (d - shift) - (zc_scale zc + offset). T is float, or Vec for lanes of
// channels.
template <typename T>
struct Coefficients {
  T shift, scale, zc_scale, offset;

  template <typename V>
  DZ_INLINE V change(V d, V zc) const {
    return scale * (d - shift) - (zc_scale * zc + offset);
  }
};

// The coefficients of a norm with constant statistics; before = variance + eps.
DZ_INLINE Coefficients<float> evaluation_coefficients(double before, double gamma) {
  return {0.0f, static_cast<float>(gamma / __builtin_sqrt(before)), 0.0f, 0.0f};
}

// The coefficients of a norm in training, from the moments about `shift` of `size` elements. variance_of(mean_d) is the
// new variance + eps from the perturbed values themselves.
template <typename Variance>
Coefficients<float> training_coefficients(const Moments& sums, float shift, int64_t size, double before, double gamma,
                                          Variance variance_of) {
  const double count = static_cast<double>(size), mean_e = sums.e / count, mean_d = shift + mean_e;
  const double dvar = (2 * sums.ze + sums.e2) / count - mean_e * mean_e, s = __builtin_sqrt(before);
  double after = before + dvar;
  if (after < before * kCancelled) after = variance_of(mean_d);
  const double t = __builtin_sqrt(after), a = gamma / t;
  Coefficients<float> with;
  with.shift = static_cast<float>(mean_d);
  with.scale = static_cast<float>(a);
  with.zc_scale = static_cast<float>(gamma * dvar / (s * t * (s + t)));
  with.offset = static_cast<float>(a * (mean_d - with.shift));
  return with;
}

// max(y + dy, 0) - max(y, 0) without subtracting the two: one of the two terms of the sum is 0. NaN stays NaN.
DZ_INLINE Vec relu_change(Vec y, Vec dy) {
  const Vec zero = {};
  const Vec moved = (y > zero ? zero : y) + dy, least = y > zero ? -y : zero;
  return moved < least ? least : moved;
}

// The maximum of two; NaN stays NaN.
template <typename V>
DZ_INLINE V larger(V a, V b) {
  return (b > a) | (b != b) ? b : a;
}

DZ_INLINE float larger(float a, float b) { return b > a || b != b ? b : a; }

// Strips `first` to `last`, which are floats begin .. end - 1; rows that belong to no window may lie among them.
struct Piece {
  int64_t first, last, begin, end;
};

// The rows of pooling windows, split into pieces of about `target` floats. Strip q has the `pool` rows of width `line`
// under row q of the result [N, H / pool].
struct Strips {
  Strips(int64_t N, int64_t H, int64_t line_, int64_t pool_, int64_t target)
      : rows(H),
        line(line_),
        pool(pool_),
        out_rows(H / pool),
        count(N * out_rows),
        at_once(greater(1, target / (pool * line))),
        pieces(ceil_div(count, at_once)),
        widest(0) {
    for (int64_t k = 0; k < pieces; ++k) widest = greater(widest, piece(k).end - piece(k).begin);
  }
  int64_t start(int64_t strip) const { return (strip / out_rows * rows + strip % out_rows * pool) * line; }
  Piece piece(int64_t k) const {
    const int64_t first = k * at_once, last = lesser(count, first + at_once) - 1;
    return {first, last, start(first), start(last) + pool * line};
  }

  int64_t rows, line, pool, out_rows, count, at_once, pieces, widest;
};

}  // namespace
}  // namespace dz
