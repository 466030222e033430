// Epilogue of a batch norm on channel planes: ReLU and max pooling of the change. The base output of the norm is
// recomputed from its centred input zc.
#pragma once

#include "batch_norm.h"

namespace dz {
namespace {

// The base output of the norm before the ReLU, scale zc + offset. Recomputing it costs no memory traffic. It may differ
// from the model's own value by rounding.
struct Affine {
  float scale, offset;

  template <typename V>
  DZ_INLINE V operator()(V zc) const {
    return scale * zc + offset;
  }
};

DZ_INLINE Affine affine(double before, double gamma, double beta) {
  return {static_cast<float>(gamma / __builtin_sqrt(before)), static_cast<float>(beta)};
}

template <bool RELU>
void change_rows(const float* d, const float* zc, float* out, const Coefficients<float> with, const Affine base,
                 int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = min_of(kLanes, size - i);
    const bool full = count == kLanes;
    const Vec z = full ? load<Vec>(zc + i) : load_partial(zc + i, count);
    Vec v = with.change(full ? load<Vec>(d + i) : load_partial(d + i, count), z);
    if constexpr (RELU) v = relu_change(base(z), v);
    if (full) {
      store(out + i, v);
    } else {
      store_partial(out + i, v, count);
    }
  }
}

// The maximum, in one instruction; b if either is NaN.
DZ_INLINE Vec max_of_numbers(Vec a, Vec b) {
#if defined(__AVX512F__)
  const __mmask16 all = 0xffff;  // GCC 12 warns of _mm512_max_ps
  return reinterpret_cast<Vec>(_mm512_maskz_max_ps(all, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// The maximum of two changes. In training mode one NaN makes the statistics NaN, hence every change of the channel, so
// the cheaper maximum will do.
template <bool TRAINING>
DZ_INLINE Vec max_change(Vec a, Vec b) {
  return TRAINING ? max_of_numbers(a, b) : max_of(a, b);
}

struct RowPair {
  Vec above, below;
};

// Calls each(take, at, count) for all 2 x 2 windows in strips first .. last, `count` windows at a time. take(values)
// loads both rows of these windows from a plane that starts at strip `first`; `at` is the offset of their results.
template <typename Each>
DZ_INLINE void by_windows(const Strips& strips, int64_t first, int64_t last, Each each) {
  const int64_t W = strips.line, columns = W / 2, dropped = strips.rows % 2 * W;
  int64_t q = first, at = 0, out = 0;
  if (dropped == 0 && W % 2 == 0 && W < kLanes && kLanes % W == 0) {  // several rows fill one vector
    const Mask even = (kLane & -static_cast<int32_t>(W)) + kLane, odd = even + static_cast<int32_t>(W);
    const int64_t size = (last + 1 - first) * 2 * W;
    for (; at + 2 * kLanes <= size; at += 2 * kLanes, out += kLanes / 2) {
      const auto take = [=](const float* from) {
        const Vec a = load<Vec>(from + at), b = load<Vec>(from + at + kLanes);
        return RowPair{__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, odd)};
      };
      each(take, out, kLanes / 2);
    }
    q += at / (2 * W);
  }
  if (q > last) return;
  for (int64_t row = q % strips.out_rows; q <= last; ++q) {
    for (int64_t x = 0; x < 2 * columns; x += kLanes) {
      const int64_t count = min_of(kLanes, 2 * columns - x), from_here = at + x;
      const auto take = [=](const float* from) {
        const float* here = from + from_here;
        return count == kLanes ? RowPair{load<Vec>(here), load<Vec>(here + W)}
                               : RowPair{load_partial(here, count), load_partial(here + W, count)};
      };
      each(take, out + x / 2, count / 2);
    }
    const bool end = ++row == strips.out_rows;  // of an image
    row = end ? 0 : row;
    at += 2 * W + (end ? dropped : 0);
    out += columns;
  }
}

// Vectors of base values per vector of 2 x 2 windows: two rows of zc, two rows of y - m, and m = max(window of y, 0).
constexpr int64_t kWindowParts = 5;

constexpr int64_t kAffine = 16;  // floats reserved for Affine at the start of the base values: one cache line

// Floats that make_base writes for one piece.
DZ_INLINE int64_t base_floats(const Strips& strips) {
  const int64_t windows = ceil_div(strips.line / 2 * 2, kLanes) * kWindowParts * kLanes;
  return kAffine + (strips.pool == 2 ? strips.at_once * windows : 0);
}

// Computes the base values of strips first .. last that change_strips reads besides zc.
DZ_INLINE void make_base(const Strips& strips, int64_t first, int64_t last, const float* zc, const Affine base,
                         float* to) {
  store(to, base);
  if (strips.pool != 2) return;
  to += kAffine;
  by_windows(strips, first, last, [&](auto take, int64_t, int64_t) {
    const RowPair z = take(zc);
    const Vec y0 = base(z.above), y1 = base(z.below), zero = {};
    Vec m = max_of_numbers(y0, y1);
    m = max_of_numbers(max_of_numbers(m, __builtin_shuffle(m, kLane ^ 1)), zero);
    const Vec parts[kWindowParts] = {z.above, z.below, y0 - m, y1 - m, m};
    for (int64_t k = 0; k < kWindowParts; ++k) store(to + k * kLanes, parts[k]);
    to += kWindowParts * kLanes;
  });
}

// Computes max(y + dy, 0) - m as max(dy + (y - m), -m). y - m is 0 at the maximum of a window, and exact for values
// close to it.
template <bool TRAINING>
void pool_windows(const Strips& strips, int64_t first, int64_t last, const float* d, const float* windows, float* out,
                  const Coefficients<float> with) {
  const auto below_max = [&](Vec change, Vec z, Vec gap) {
    return with.scale * (change - with.shift) + (gap - with.zc_scale * z);
  };
  by_windows(strips, first, last, [&](auto take, int64_t at, int64_t count) {
    const RowPair change = take(d);
    const auto part = [&](int64_t k) { return load<Vec>(windows + k * kLanes); };
    Vec best =
        max_change<TRAINING>(below_max(change.above, part(0), part(2)), below_max(change.below, part(1), part(3)));
    best = max_change<TRAINING>(best, __builtin_shuffle(best, kLane ^ 1)) - with.offset;
    store_partial(out + at, __builtin_shuffle(max_change<TRAINING>(-part(4), best), kLane * 2), count);
    windows += kWindowParts * kLanes;
  });
}

// One strip of pool x pool windows, for any pool.
inline void pool_any_row(const float* d, const float* zc, float* out, const Coefficients<float>& with,
                         const Affine& base, int64_t W, int64_t columns, int64_t pool) {
  for (int64_t v = 0; v < columns; ++v) {
    const auto largest = [&](float start, auto value) {
      for (int64_t i = 0; i < pool; ++i) {
        for (int64_t j = 0; j < pool; ++j) start = max_of(start, value(i * W + v * pool + j));
      }
      return start;
    };
    const float before = largest(0.0f, [&](int64_t at) { return base(zc[at]); });
    out[v] = largest(-before, [&](int64_t at) { return with.change(d[at], zc[at]) + (base(zc[at]) - before); });
  }
}

// The change of the norm's output in strips first .. last, after ReLU and pooling. d and zc start at strip `first`;
// base_values come from make_base.
inline void change_strips(const Strips& strips, int64_t first, int64_t last, bool training, bool relu, const float* d,
                          const float* zc, const float* base_values, float* out, const Coefficients<float>& with) {
  const int64_t W = strips.line, pool = strips.pool;
  if (pool == 2) {
    const float* windows = base_values + kAffine;
    return training ? pool_windows<true>(strips, first, last, d, windows, out, with)
                    : pool_windows<false>(strips, first, last, d, windows, out, with);
  }
  const Affine base = load<Affine>(base_values);
  if (pool == 1) {
    const int64_t size = (last + 1 - first) * W;
    return relu ? change_rows<true>(d, zc, out, with, base, size) : change_rows<false>(d, zc, out, with, base, size);
  }
  for (int64_t q = first; q <= last; ++q, out += W / pool) {
    const int64_t at = strips.start(q) - strips.start(first);
    pool_any_row(d + at, zc + at, out, with, base, W, W / pool, pool);
  }
}

}  // namespace
}  // namespace dz
