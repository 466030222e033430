// What single taps of a convolution's kernel read of one plane.
#pragma once

#include "elementary.h"

namespace dz {
namespace {

// A convolution of planes [H, W] to [Ho, Wo] with zero padding.
struct Window {
  int64_t H, W, Ho, Wo, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;

  // Rows that `rows` output rows read with `kernel` rows of taps.
  int64_t rows_read(int64_t rows, int64_t kernel) const { return (rows - 1) * stride_h + (kernel - 1) * dil_h + 1; }
};

// What the taps of one column read, times `scale`: rows top, top + step, ... of the image, which may lie outside of it,
// from column `left` on, which may be negative. to [rows, Wo]
DZ_INLINE void tap_columns(const Window& window, const float* image, int64_t top, int64_t step, int64_t rows,
                           int64_t left, float scale, float* to) {
  const int64_t H = window.H, W = window.W, Wo = window.Wo;
  const auto steps = [=](int64_t size) { return step == 1 ? size : ceil_div(size, step); };  // a division takes long
  const int64_t begin = top < 0 ? lesser(rows, steps(-top)) : 0;
  const int64_t end = greater(begin, top < H ? lesser(rows, steps(H - top)) : 0);
  const auto clear = [&](int64_t i, int64_t last) {  // a call of memset would take longer
    for (; i < last; i += kLanes) store_some(to + i, Vec{}, lesser(kLanes, last - i));
  };
  clear(0, begin * Wo);
  clear(end * Wo, rows * Wo);
  const float* from = image + (top + begin * step) * W + left;
  to += begin * Wo;
  if (window.stride_w != 1) {
    for (int64_t r = begin; r < end; ++r, from += step * W, to += Wo) {
      for (int64_t v = 0; v < Wo; ++v) {
        const int64_t column = v * window.stride_w + left;
        to[v] = column >= 0 && column < W ? scale * from[v * window.stride_w] : 0.0f;
      }
    }
    return;
  }
  for (int64_t v = 0; v < Wo; v += kLanes, from += kLanes, to += kLanes) {
    const int64_t first = greater(0, lesser(kLanes, -left - v));
    const int64_t last = greater(first, lesser(kLanes, W - left - v)), count = lesser(kLanes, Wo - v);
    for (int64_t r = 0; r < end - begin; ++r) {
      store_some(to + r * Wo, scale * load_between(from + r * step * W, first, last), count);
    }
  }
}

// What a tap reads for pixel m of all [N, Ho, Wo] of one plane [N, H, W].
DZ_INLINE float tap_value(const Window& window, const float* plane, int64_t m, int64_t top, int64_t left) {
  const int64_t v = m % window.Wo, u = m / window.Wo % window.Ho, n = m / window.Wo / window.Ho;
  const int64_t row = u * window.stride_h + top, column = v * window.stride_w + left;
  const bool inside = row >= 0 && row < window.H && column >= 0 && column < window.W;
  return inside ? plane[(n * window.H + row) * window.W + column] : 0.0f;
}

// Calls each(n, u, rows, at) for the parts of output rows first .. last - 1 of all images that lie in one image: rows
// u .. u + rows - 1 of image n, which begin `at` rows after `first`.
template <typename Each>
DZ_INLINE void by_image(const Window& window, int64_t first, int64_t last, Each each) {
  int64_t n = first / window.Ho, u = first % window.Ho;
  for (int64_t r = first; r < last; ++n, u = 0) {
    const int64_t rows = lesser(window.Ho - u, last - r);
    each(n, u, rows, r - first);
    r += rows;
  }
}

}  // namespace
}  // namespace dz
