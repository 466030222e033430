// The change of a batch norm's output: sums for the new statistics, coefficients, ReLU, and the partition for pooling.
//
// d is the change of the norm's input, zc the centred base input. Coefficients are named after the formula
//
//   dy = scale (d - shift) - (zc_scale zc + offset)
#pragma once

#include "elementary.h"

namespace dz {
namespace {

// Per-lane sums of e = d - shift, e^2 and zc e. They determine the mean and variance of zc + d. A shift close to the
// mean of d avoids cancellation.
struct LaneSums {
  Vec e = {}, e2 = {}, ze = {};

  DZ_INLINE void add(Vec e_, Vec zc) {
    e += e_;
    e2 += e_ * e_;
    ze += e_ * zc;
  }
};

// The same sums over a whole channel.
struct Moments {
  double e, e2, ze;

  Moments& operator+=(const Moments& other) {
    e += other.e, e2 += other.e2, ze += other.ze;
    return *this;
  }
};

// When the new variance is below this fraction of the old one, the old variance and its change have cancelled and lost
// four bits. The new variance is then recomputed from the perturbed values.
constexpr double kCancelled = 1.0 / 16;

// Coefficients of dy. T is float for one channel, or Vec for one channel per lane.
template <typename T>
struct Coefficients {
  T shift, scale, zc_scale, offset;

  template <typename V>
  DZ_INLINE V change(V d, V zc) const {
    return scale * (d - shift) - (zc_scale * zc + offset);
  }
};

// Coefficients of a norm in evaluation mode (constant statistics); before = variance + eps.
DZ_INLINE Coefficients<float> evaluation_coefficients(double before, double gamma) {
  return {0.0f, static_cast<float>(gamma / __builtin_sqrt(before)), 0.0f, 0.0f};
}

// Coefficients of a norm in training mode, from the moments of `size` elements about `shift`. variance_of(mean_d)
// recomputes the new variance + eps from the perturbed values.
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

// max(y + dy, 0) - max(y, 0) without cancellation, as max(min(y, 0) + dy, -max(y, 0)). NaN stays NaN.
DZ_INLINE Vec relu_change(Vec y, Vec dy) {
  const Vec zero = {};
  const Vec change = (y > zero ? zero : y) + dy, bound = y > zero ? -y : zero;
  return change < bound ? bound : change;
}

// The maximum; NaN if either is NaN.
template <typename V>
DZ_INLINE V max_of(V a, V b) {
  return (b > a) | (b != b) ? b : a;
}

DZ_INLINE float max_of(float a, float b) { return b > a || b != b ? b : a; }

// Strips first .. last (inclusive): floats begin .. end - 1. Rows that belong to no window may lie in between.
struct Piece {
  int64_t first, last, begin, end;
};

// Partition of planes [N, H, line] for pooling. Strip q is the `pool` rows that row q of the result [N, H / pool]
// reads. A piece is a run of strips with about `target` floats.
struct Strips {
  Strips(int64_t N, int64_t H, int64_t line_, int64_t pool_, int64_t target)
      : rows(H),
        line(line_),
        pool(pool_),
        out_rows(H / pool),
        count(N * out_rows),
        at_once(max_of(1, target / (pool * line))),
        pieces(ceil_div(count, at_once)),
        widest(0) {
    for (int64_t k = 0; k < pieces; ++k) widest = max_of(widest, piece(k).end - piece(k).begin);
  }
  int64_t start(int64_t strip) const { return (strip / out_rows * rows + strip % out_rows * pool) * line; }
  Piece piece(int64_t k) const {
    const int64_t first = k * at_once, last = min_of(count, first + at_once) - 1;
    return {first, last, start(first), start(last) + pool * line};
  }

  int64_t rows, line, pool, out_rows, count, at_once, pieces, widest;
};

}  // namespace
}  // namespace dz
