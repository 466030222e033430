// One head of an attention whose queries, keys and values move.
#pragma once

#include "gemm.h"
#include "softmax.h"

namespace dz {
namespace {

// As two products: dS = scale [dq, q + dq] [k, dk]^T and out = [dA, p + dA] [v, dv], of which parts may be missing.
struct Head {
  static constexpr int64_t kRows = 64;     // of a block, of which the inner product with all columns is kept
  static constexpr int64_t kKept = 65536;  // and at most so many numbers

  bool has_dq, has_dk, has_dv;
  int64_t T, S, D, E;
  bool moves = has_dq || has_dk;  // the probabilities do
  int64_t inner = (int64_t{has_dq} + int64_t{has_dk}) * D, outer = (int64_t{moves} + int64_t{has_dv}) * S;
  int64_t wide = ceil_div(S, kLanes) * kLanes, kept_row = S + wide;  // dA, then dS, which gives way to p + dA
  int64_t block = lesser(T, greater(8, lesser(kRows, kKept / kept_row)));

  // Numbers that the packed factors and the rows of a block take, in whole cache lines so that threads share none.
  int64_t keys_size() const { return lines(inner * wide); }
  int64_t values_size() const { return lines(outer * ceil_div(E, kLanes) * kLanes); }
  int64_t left_size() const { return lines(block * inner); }
  int64_t rows_size() const { return left_size() + lines(block * kept_row); }
  static int64_t lines(int64_t size) { return ceil_div(size, 16) * 16; }

  void pack_base(const float* k, int64_t k_row, const float* v, int64_t v_row, float* keys, float* values) const {
    if (has_dq) pack_turned(k, k_row, D, S, inner, 0, keys);
    if (moves) pack(v, v_row, S, E, outer, 0, values);
  }

  template <typename In>
  void pack_moved(const In* dk, int64_t dk_row, const In* dv, int64_t dv_row, float* keys, float* values) const {
    if (has_dk) pack_turned(dk, dk_row, D, S, inner, inner - D, keys);
    if (has_dv) pack(dv, dv_row, S, E, outer, outer - S, values);
  }

  // out [T, E], its rows out_row apart; p [T, S]. What is packed is left as it is, scratch [rows_size()] is not.
  template <typename In, typename Out>
  void attend(const In* dq, int64_t dq_row, const float* q, int64_t q_row, const float* p, const float* keys,
              const float* values, float scale, float* scratch, Out* out, int64_t out_row) const {
    float *left = scratch, *kept = scratch + left_size();
    const In* none = nullptr;
    for (int64_t start = 0; start < T; start += block) {
      const int64_t rows = lesser(block, T - start);
      const float* prob = p + start * S;
      Out* to = out + start * out_row;
      if (!moves) {
        product(prob, S, rows, values, outer, to, out_row, E);
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* row = left + i * inner;
        const In* change = has_dq ? dq + (start + i) * dq_row : none;
        if (has_dq) scaled_sum(change, none, scale, row, D);
        if (has_dk) scaled_sum(change, q + (start + i) * q_row, scale, row + inner - D, D);
      }
      product(left, inner, rows, keys, inner, kept + S, kept_row, wide);
      for (int64_t i = 0; i < rows; i += kTogether) {
        float *change = kept + i * kept_row, *score = change + S;
        const int64_t count = lesser(kTogether, rows - i);
        if (has_dv) {
          softmax_rows<true>(score, kept_row, prob + i * S, change, kept_row, score, count, S);
        } else {
          softmax_rows<false>(score, kept_row, prob + i * S, change, kept_row, nullptr, count, S);
        }
      }
      product(kept, kept_row, rows, values, outer, to, out_row, E);
    }
  }

 private:
  // to = scale * (a + b) for one row; either may be missing.
  template <typename A, typename B>
  static void scaled_sum(const A* a, const B* b, float scale, float* to, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes) {
      const int64_t count = lesser(kLanes, size - i);
      Vec v = {};
      if (a != nullptr) v += load_some(a + i, count);
      if (b != nullptr) v += load_some(b + i, count);
      store_some(to + i, v * scale, count);
    }
  }
};

}  // namespace
}  // namespace dz
