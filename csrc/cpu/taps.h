// Input values that single taps of a convolution's kernel read from one plane.
#pragma once

#include "elementary.h"

namespace dz {
namespace {

// A convolution of planes [H, W] to [Ho, Wo] with zero padding.
struct Window {
  int64_t H, W, Ho, Wo, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;

  // Input rows spanned by `rows` output rows with `kernel` rows of taps.
  int64_t rows_read(int64_t rows, int64_t kernel) const { return (rows - 1) * stride_h + (kernel - 1) * dil_h + 1; }
};

// Copies what a tap reads, times `scale`, to [rows, Wo]: image rows top, top + step, ..., starting at column `left`.
// Rows and columns outside the image read zeros.
DZ_INLINE void tap_columns(const Window& window, const float* image, int64_t top, int64_t step, int64_t rows,
                           int64_t left, float scale, float* to) {
  const int64_t H = window.H, W = window.W, Wo = window.Wo;
  const auto steps = [=](int64_t size) { return step == 1 ? size : ceil_div(size, step); };  // avoids a division
  const int64_t begin = top < 0 ? min_of(rows, steps(-top)) : 0;
  const int64_t end = max_of(begin, top < H ? min_of(rows, steps(H - top)) : 0);
  const auto clear = [&](int64_t i, int64_t last) {  // too short for a call of memset
    for (; i < last; i += kLanes) store_partial(to + i, Vec{}, min_of(kLanes, last - i));
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
    const int64_t first = max_of(0, min_of(kLanes, -left - v));
    const int64_t last = max_of(first, min_of(kLanes, W - left - v)), count = min_of(kLanes, Wo - v);
    for (int64_t r = 0; r < end - begin; ++r) {
      store_partial(to + r * Wo, scale * load_between(from + r * step * W, first, last), count);
    }
  }
}

// What a tap reads from the plane [N, H, W] for output pixel m of [N, Ho, Wo].
DZ_INLINE float tap_value(const Window& window, const float* plane, int64_t m, int64_t top, int64_t left) {
  const int64_t v = m % window.Wo, u = m / window.Wo % window.Ho, n = m / window.Wo / window.Ho;
  const int64_t row = u * window.stride_h + top, column = v * window.stride_w + left;
  const bool inside = row >= 0 && row < window.H && column >= 0 && column < window.W;
  return inside ? plane[(n * window.H + row) * window.W + column] : 0.0f;
}

// Splits output rows first .. last - 1 of all images by image. Calls each(n, u, rows, at) for rows u .. u + rows - 1 of
// image n; `at` is their distance from row `first`.
template <typename Each>
DZ_INLINE void by_image(const Window& window, int64_t first, int64_t last, Each each) {
  int64_t n = first / window.Ho, u = first % window.Ho;
  for (int64_t r = first; r < last; ++n, u = 0) {
    const int64_t rows = min_of(window.Ho - u, last - r);
    each(n, u, rows, r - first);
    r += rows;
  }
}

}  // namespace
}  // namespace dz
