// Batch norm, ReLU and max pooling of a difference that lies channel by channel.
#pragma once

#include "elementary.h"
#include "norm.h"

namespace dz {
namespace {

constexpr int64_t kSums = 4;                   // vectors that are summed side by side
constexpr int64_t kRun = 64 * kSums * kLanes;  // elements whose sums stay in float32: 64 terms each

// Of e = d - shift over the pixels of one channel: sums of e, e^2 and zc e.
struct Moments {
  double e1, e2, ze;

  Moments& operator+=(const Moments& other) {
    e1 += other.e1, e2 += other.e2, ze += other.ze;
    return *this;
  }
};

typedef double Wide __attribute__((vector_size(kLanes * sizeof(double))));

DZ_INLINE double sum_of(Wide v) {
  double total = 0.0;
  for (int64_t i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline Moments moments(const float* d, const float* zc, float shift, int64_t size) {
  Wide wide_e1 = {}, wide_e2 = {}, wide_ze = {};
  int64_t i = 0;
  while (size - i >= kSums * kLanes) {
    const int64_t end = i + lesser(kRun, (size - i) / (kSums * kLanes) * (kSums * kLanes));
    Vec a[kSums] = {}, b[kSums] = {}, c[kSums] = {};
    for (; i < end; i += kSums * kLanes) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < kSums; ++k) {
        const Vec e = load<Vec>(d + i + k * kLanes) - shift;
        a[k] += e;
        b[k] += e * e;
        c[k] += e * load<Vec>(zc + i + k * kLanes);
      }
    }
    for (int64_t k = 0; k < kSums; ++k) {
      wide_e1 += __builtin_convertvector(a[k], Wide);
      wide_e2 += __builtin_convertvector(b[k], Wide);
      wide_ze += __builtin_convertvector(c[k], Wide);
    }
  }
  Moments sums = {sum_of(wide_e1), sum_of(wide_e2), sum_of(wide_ze)};
  for (; i < size; ++i) {
    const double e = d[i] - shift;
    sums += {e, e * e, e * zc[i]};
  }
  return sums;
}

// Sum of (zc + d - mean_d)^2.
inline double moved_variance(const float* zc, const float* d, double mean_d, int64_t size) {
  double total = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    const double moved = zc[i] + (d[i] - mean_d);
    total += moved * moved;
  }
  return total;
}

// The change of the norm: scale (d - shift) - (pull zc + offset)
struct Coefficients {
  float shift, scale, pull, offset;

  DZ_INLINE Vec change(Vec d, Vec zc) const { return scale * (d - shift) - (pull * zc + offset); }
  DZ_INLINE float change(float d, float zc) const { return scale * (d - shift) - (pull * zc + offset); }
};

// Of a norm whose statistics stand still; before = variance + eps.
DZ_INLINE Coefficients still_coefficients(double before, double gamma) {
  return {0.0f, static_cast<float>(gamma / __builtin_sqrt(before)), 0.0f, 0.0f};
}

// Of a norm in training; the moments are about `shift`. variance_of(mean_d) is the new variance + eps from the moved
// values themselves, for where the old one and its change cancel.
template <typename Variance>
Coefficients moved_coefficients(const Moments& sums, float shift, int64_t size, double before, double gamma,
                                Variance variance_of) {
  const double count = static_cast<double>(size), mean_e = sums.e1 / count, mean_d = shift + mean_e;
  const double dvar = (2 * sums.ze + sums.e2) / count - mean_e * mean_e, s = __builtin_sqrt(before);
  double after = before + dvar;
  if (after < before / 16) after = variance_of(mean_d);  // four bits are gone
  const double t = __builtin_sqrt(after), a = gamma / t;
  Coefficients with;
  with.shift = static_cast<float>(mean_d);
  with.scale = static_cast<float>(a);
  with.pull = static_cast<float>(gamma * dvar / (s * t * (s + t)));
  with.offset = static_cast<float>(a * (mean_d - with.shift));
  return with;
}

// Base output of the norm, before the ReLU: scale zc + offset. It is off from the one that the model computed by
// roundings, as that is from the exact one, and takes no memory traffic.
struct Base {
  float scale, offset;

  template <typename V>
  DZ_INLINE V operator()(V zc) const {
    return scale * zc + offset;
  }
};

DZ_INLINE Base base_of(double before, double gamma, double beta) {
  return {static_cast<float>(gamma / __builtin_sqrt(before)), static_cast<float>(beta)};
}

template <bool RELU>
void change_rows(const float* d, const float* zc, float* out, const Coefficients with, const Base base, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = lesser(kLanes, size - i);
    const bool whole = count == kLanes;
    const Vec z = whole ? load<Vec>(zc + i) : load_some(zc + i, count);
    Vec v = with.change(whole ? load<Vec>(d + i) : load_some(d + i, count), z);
    if constexpr (RELU) v = relu_change(base(z), v);
    if (whole) {
      store(out + i, v);
    } else {
      store_some(out + i, v, count);
    }
  }
}

// The larger one, b where either is NaN.
DZ_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  const __mmask16 all = 0xffff;  // GCC 12 warns of _mm512_max_ps
  return reinterpret_cast<Vec>(_mm512_maskz_max_ps(all, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// The larger one of differences. A norm in training makes all of them NaN or none, and needs no care.
template <bool TRAINING>
DZ_INLINE Vec larger_change(Vec a, Vec b) {
  return TRAINING ? maximum(a, b) : larger(a, b);
}

struct Rows2 {
  Vec above, below;
};

// Calls each(take, at, windows) for some windows of 2 x 2 after the other, all in rows of windows `first` to `last`:
// take(from) gives both of their rows, of values that begin with the first row; their results begin `at` floats after
// the first.
template <typename Each>
DZ_INLINE void by_windows(const Strips& strips, int64_t first, int64_t last, Each each) {
  const int64_t W = strips.line, columns = W / 2, dropped = strips.rows % 2 * W;
  int64_t q = first, at = 0, out = 0;
  if (dropped == 0 && W % 2 == 0 && W < kLanes && kLanes % W == 0) {  // whole rows fill a vector together
    const Mask even = (kLane & -static_cast<int32_t>(W)) + kLane, odd = even + static_cast<int32_t>(W);
    const int64_t size = (last + 1 - first) * 2 * W;
    for (; at + 2 * kLanes <= size; at += 2 * kLanes, out += kLanes / 2) {
      const auto take = [=](const float* from) {
        const Vec a = load<Vec>(from + at), b = load<Vec>(from + at + kLanes);
        return Rows2{__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, odd)};
      };
      each(take, out, kLanes / 2);
    }
    q += at / (2 * W);
  }
  if (q > last) return;
  for (int64_t row = q % strips.out_rows; q <= last; ++q) {
    for (int64_t x = 0; x < 2 * columns; x += kLanes) {
      const int64_t count = lesser(kLanes, 2 * columns - x), from_here = at + x;
      const auto take = [=](const float* from) {
        const float* here = from + from_here;
        return count == kLanes ? Rows2{load<Vec>(here), load<Vec>(here + W)}
                               : Rows2{load_some(here, count), load_some(here + W, count)};
      };
      each(take, out + x / 2, count / 2);
    }
    const bool end = ++row == strips.out_rows;  // of an image
    row = end ? 0 : row;
    at += 2 * W + (end ? dropped : 0);
    out += columns;
  }
}

// Vectors of what windows of 2 x 2 have of the base: both rows of zc and of y - m, and m, the maximum of y and 0.
constexpr int64_t kWindowParts = 5;

// Floats that make_base writes for the rows of windows of one piece.
DZ_INLINE int64_t base_floats(const Strips& strips) {
  return strips.pool == 2 ? strips.at_once * ceil_div(strips.line / 2 * 2, kLanes) * kWindowParts * kLanes : 0;
}

// The base of rows of windows `first` to `last` of strips as change_strips takes it, where it is not zc itself.
inline void make_base(const Strips& strips, int64_t first, int64_t last, const float* zc, const Base base, float* to) {
  if (strips.pool != 2) return;
  by_windows(strips, first, last, [&](auto take, int64_t, int64_t) {
    const Rows2 z = take(zc);
    const Vec y0 = base(z.above), y1 = base(z.below), zero = {};
    Vec most = maximum(y0, y1);
    most = maximum(maximum(most, __builtin_shuffle(most, kLane ^ 1)), zero);
    const Vec parts[kWindowParts] = {z.above, z.below, y0 - most, y1 - most, most};
    for (int64_t k = 0; k < kWindowParts; ++k) store(to + k * kLanes, parts[k]);
    to += kWindowParts * kLanes;
  });
}

// max(y + dy, 0) - m is the largest of dy + (y - m) and -m. y - m is 0 for the winner of a window, exact for one near.
template <bool TRAINING>
void pool_windows(const Strips& strips, int64_t first, int64_t last, const float* d, const float* windows, float* out,
                  const Coefficients with) {
  const auto moved = [&](Vec change, Vec z, Vec gap) {
    return with.scale * (change - with.shift) + (gap - with.pull * z);
  };
  by_windows(strips, first, last, [&](auto take, int64_t at, int64_t count) {
    const Rows2 change = take(d);
    const auto part = [&](int64_t k) { return load<Vec>(windows + k * kLanes); };
    Vec best = larger_change<TRAINING>(moved(change.above, part(0), part(2)), moved(change.below, part(1), part(3)));
    best = larger_change<TRAINING>(best, __builtin_shuffle(best, kLane ^ 1)) - with.offset;
    store_some(out + at, __builtin_shuffle(larger_change<TRAINING>(-part(4), best), kLane * 2), count);
    windows += kWindowParts * kLanes;
  });
}

// One row of windows of pool x pool, any size.
inline void pool_any_row(const float* d, const float* zc, float* out, const Coefficients& with, const Base& base,
                         int64_t W, int64_t columns, int64_t pool) {
  for (int64_t v = 0; v < columns; ++v) {
    const auto largest = [&](float start, auto value) {
      for (int64_t i = 0; i < pool; ++i) {
        for (int64_t j = 0; j < pool; ++j) start = larger(start, value(i * W + v * pool + j));
      }
      return start;
    };
    const float before = largest(0.0f, [&](int64_t at) { return base(zc[at]); });
    out[v] = largest(-before, [&](int64_t at) { return with.change(d[at], zc[at]) + (base(zc[at]) - before); });
  }
}

// Rows of windows `first` to `last` of strips: the change of the norm, through the ReLU, pooled. d and zc begin with
// the first of them; `made` is of make_base; out takes a row of windows after the other.
inline void change_strips(const Strips& strips, int64_t first, int64_t last, bool training, bool relu, const float* d,
                          const float* zc, const float* made, float* out, const Coefficients& with, const Base& base) {
  const int64_t W = strips.line, pool = strips.pool;
  if (pool == 1) {
    const int64_t size = (last + 1 - first) * W;
    return relu ? change_rows<true>(d, zc, out, with, base, size) : change_rows<false>(d, zc, out, with, base, size);
  }
  if (pool == 2) {
    return training ? pool_windows<true>(strips, first, last, d, made, out, with)
                    : pool_windows<false>(strips, first, last, d, made, out, with);
  }
  for (int64_t q = first; q <= last; ++q, out += W / pool) {
    const int64_t at = strips.start(q) - strips.start(first);
    pool_any_row(d + at, zc + at, out, with, base, W, W / pool, pool);
  }
}

}  // namespace
}  // namespace dz
