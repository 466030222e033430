// Loads the rows of differences that enter a linear layer, and stores those that leave it.
#pragma once

#include "gemm.h"
#include "layer_norm.h"

namespace dz {
namespace {

template <typename In>
DZ_INLINE Vec load_any(const In* from, int64_t count) {
  return count == kLanes ? load_vec(from) : load_partial(from, count);
}

template <typename To>
DZ_INLINE void store_any(To* to, Vec v, int64_t count) {
  if (count == kLanes) {
    store_vec(to, v);
  } else {
    store_first(to, v, count);
  }
}

template <typename In, typename To>
void convert(const In* from, To* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = min_of(kLanes, size - i);
    store_any(to + i, load_any(from + i, count), count);
  }
}

// to = a + b
template <typename B, typename To>
void add(const float* a, const B* b, To* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = min_of(kLanes, size - i);
    store_any(to + i, load_any(a + i, count) + load_any(b + i, count), count);
  }
}

// The layer norm before a linear layer; null zc: no norm.
struct Norm {
  const float* zc;     // [R, K]
  const double* var;   // [R]
  const float* gamma;  // [K]; null: all ones
  double eps;
};

// Scratch floats that load_rows needs for rows of K numbers.
DZ_INLINE int64_t norm_floats(int64_t K) { return ceil_div(kRowBatch * K, 16) * 16; }

// Converts `rows` rows of delta, after the norm if there is one, to a left factor with a row stride of to_row. The
// first is row `start` of the norm.
template <typename In, typename Number>
void load_rows(const Norm& norm, const In* delta, int64_t start, int64_t rows, int64_t K, Number* to, int64_t to_row,
               float* scratch) {
  for (int64_t r = 0; r < rows; r += kRowBatch) {
    const int64_t count = min_of(kRowBatch, rows - r);
    if (norm.zc != nullptr) {
      norm_rows(delta + r * K, scratch, norm.zc + (start + r) * K, norm.var + start + r, norm.gamma, to + r * to_row,
                to_row, norm.eps, count, K, true);
      continue;
    }
    for (int64_t i = r; i < r + count; ++i) convert(delta + i * K, to + i * to_row, K);
  }
}

// to[at + i] = values[i] + residual[at + i] for a row of M numbers; a null residual counts as 0.
template <typename B, typename To>
DZ_INLINE void store_row(const float* values, const B* residual, To* to, int64_t at, int64_t M) {
  if (residual == nullptr) {
    convert(values, to + at, M);
  } else {
    add(values, residual + at, to + at, M);
  }
}

}  // namespace
}  // namespace dz
