// What the batch norm kernels share.
#pragma once

#include "common.h"

namespace dz {
namespace {

// The first `count` floats of a vector whose others are zero.
template <typename T>
DZ_INLINE Vec load_first(const T* from, int64_t count) {
  float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = to_float(from[i]);
  return load<Vec>(values);
}

template <typename T>
DZ_INLINE void store_first(T* to, Vec v, int64_t count) {
  T values[kLanes];
  store_vec(values, v);
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
}

// max(y + dy, 0) - max(y, 0) without subtracting the two: one of the two terms of the sum is 0. NaN stays NaN.
DZ_INLINE Vec relu_change(Vec y, Vec dy) {
  const Vec zero = {};
  const Vec moved = (y > zero ? zero : y) + dy, least = y > zero ? -y : zero;
  return moved < least ? least : moved;
}

// The larger one; NaN stays NaN.
template <typename V>
DZ_INLINE V larger(V a, V b) {
  return (b > a) | (b != b) ? b : a;
}

DZ_INLINE float larger(float a, float b) { return b > a || b != b ? b : a; }

// Rows of windows, dealt in pieces of about `target` floats. Strip q is the rows under output row q of [N, H / pool].
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
    for (int64_t k = 0; k < pieces; ++k) widest = greater(widest, end(k) - begin(k));
  }
  int64_t start(int64_t strip) const { return (strip / out_rows * rows + strip % out_rows * pool) * line; }
  int64_t first(int64_t piece) const { return piece * at_once; }
  int64_t last(int64_t piece) const { return lesser(count, (piece + 1) * at_once) - 1; }
  // Floats of a piece; rows that belong to no window may lie in between.
  int64_t begin(int64_t piece) const { return start(first(piece)); }
  int64_t end(int64_t piece) const { return start(last(piece)) + pool * line; }

  int64_t rows, line, pool, out_rows, count, at_once, pieces, widest;
};

}  // namespace
}  // namespace dz
