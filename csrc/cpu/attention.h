// One head of an attention with perturbed queries, keys and values.
#pragma once

#include "gemm.h"
#include "softmax.h"

namespace dz {
namespace {

// Two products: dS = scale [dq, q + dq] [k, dk]^T, then out = [dA, p + dA] [v, dv]. The parts of a null dq, dk or dv
// are left out.
struct Head {
  // Limits of a block of rows, whose dS and dA stay in cache.
  static constexpr int64_t kMaxRows = 64;
  static constexpr int64_t kMaxFloats = 65536;

  bool has_dq, has_dk, has_dv;
  int64_t T, S, D, E;
  bool p_changes = has_dq || has_dk;
  int64_t inner = (int64_t{has_dq} + int64_t{has_dk}) * D, outer = (int64_t{p_changes} + int64_t{has_dv}) * S;
  int64_t padded_S = ceil_div(S, kLanes) * kLanes;
  int64_t cached_row = S + padded_S;  // of a block: dA [S], then dS [padded_S], which p + dA replaces
  int64_t block = min_of(T, max_of(8, min_of(kMaxRows, kMaxFloats / cached_row)));

  // Floats of the packed factors and of the scratch of attend, in whole cache lines: threads must not share one.
  int64_t keys_size() const { return lines(inner * padded_S); }
  int64_t values_size() const { return lines(outer * ceil_div(E, kLanes) * kLanes); }
  int64_t left_size() const { return lines(block * inner); }
  int64_t rows_size() const { return left_size() + lines(block * cached_row); }
  static int64_t lines(int64_t size) { return ceil_div(size, 16) * 16; }

  void pack_base(const float* k, int64_t k_row, const float* v, int64_t v_row, float* keys, float* values) const {
    if (has_dq) pack_transposed(k, k_row, D, S, inner, 0, keys);
    if (p_changes) pack(v, v_row, S, E, outer, 0, values);
  }

  template <typename In>
  void pack_perturbed(const In* dk, int64_t dk_row, const In* dv, int64_t dv_row, float* keys, float* values) const {
    if (has_dk) pack_transposed(dk, dk_row, D, S, inner, inner - D, keys);
    if (has_dv) pack(dv, dv_row, S, E, outer, outer - S, values);
  }

  // Writes out [T, E] with a row stride of out_row; p is [T, S], keys and values are packed, scratch is [rows_size()].
  template <typename In, typename Out>
  void attend(const In* dq, int64_t dq_row, const float* q, int64_t q_row, const float* p, const float* keys,
              const float* values, float scale, float* scratch, Out* out, int64_t out_row) const {
    float *left = scratch, *cached = scratch + left_size();
    const In* none = nullptr;
    for (int64_t start = 0; start < T; start += block) {
      const int64_t rows = min_of(block, T - start);
      const float* prob = p + start * S;
      Out* to = out + start * out_row;
      if (!p_changes) {
        product(prob, S, rows, values, outer, to, out_row, E);
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* row = left + i * inner;
        const In* change = has_dq ? dq + (start + i) * dq_row : none;
        if (has_dq) scaled_sum(change, none, scale, row, D);
        if (has_dk) scaled_sum(change, q + (start + i) * q_row, scale, row + inner - D, D);
      }
      product(left, inner, rows, keys, inner, cached + S, cached_row, padded_S);
      for (int64_t i = 0; i < rows; i += kRowBatch) {
        float *change = cached + i * cached_row, *score = change + S;
        const int64_t count = min_of(kRowBatch, rows - i);
        if (has_dv) {
          softmax_rows<true>(score, cached_row, prob + i * S, change, cached_row, score, count, S);
        } else {
          softmax_rows<false>(score, cached_row, prob + i * S, change, cached_row, nullptr, count, S);
        }
      }
      product(cached, cached_row, rows, values, outer, to, out_row, E);
    }
  }

 private:
  // to = scale * (a + b) for one row; a null a or b counts as 0.
  template <typename A, typename B>
  static void scaled_sum(const A* a, const B* b, float scale, float* to, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes) {
      const int64_t count = min_of(kLanes, size - i);
      Vec v = {};
      if (a != nullptr) v += load_partial(a + i, count);
      if (b != nullptr) v += load_partial(b + i, count);
      store_partial(to + i, v * scale, count);
    }
  }
};

}  // namespace
}  // namespace dz
