#include "gemm.h"
#include "softmax.h"

namespace dz {
namespace {

constexpr int64_t kRows = 64;     // rows of a block, of which the inner product with all columns is kept
constexpr int64_t kKept = 65536;  // and at most so many numbers

// [.., rows, columns] with its strides along perturbations, samples, heads and rows; columns are neighbours.
template <typename T>
struct Operand {
  const T* data;
  int64_t p, n, h, row;
  const T* at(int64_t perturbation, int64_t sample, int64_t head) const {
    return data + perturbation * p + sample * n + head * h;
  }
};

template <typename T>
Operand<T> operand(const void* data, const int64_t* strides) {
  return {static_cast<const T*>(data), strides[0], strides[1], strides[2], strides[3]};
}

// to = scale * (a + b) for one row; either may be missing.
template <typename A, typename B>
void scaled_sum(const A* a, const B* b, float scale, float* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = lesser(kLanes, size - i);
    Vec v = {};
    if (a != nullptr) v += load_some(a + i, count);
    if (b != nullptr) v += load_some(b + i, count);
    store_some(to + i, v * scale, count);
  }
}

template <typename In, typename Out>
void attend(Operand<In> dq, Operand<In> dk, Operand<In> dv, Operand<float> q, Operand<float> k, Operand<float> v,
            const float* p, Out* out, float scale, int64_t P, int64_t N, int64_t H, int64_t T, int64_t S, int64_t D,
            int64_t E) {
  const bool has_dq = dq.data != nullptr, has_dk = dk.data != nullptr, has_dv = dv.data != nullptr;
  const bool moves = has_dq || has_dk;  // the probabilities do
  // As two products: dS = scale [dq, q + dq] [k, dk]^T and out = [dA, p + dA] [v, dv], of which parts may be missing.
  const int64_t inner = (int64_t{has_dq} + int64_t{has_dk}) * D, outer = (int64_t{moves} + int64_t{has_dv}) * S;
  const int64_t wide = ceil_div(S, kLanes) * kLanes, kept_row = S + wide;  // dA, then dS, which gives way to p + dA
  const int64_t block = lesser(T, greater(8, lesser(kRows, kKept / kept_row)));

  // Per thread, rounded up to cache lines, so that threads do not share one.
  const auto lines = [](int64_t size) { return ceil_div(size, 16) * 16; };
  const int64_t keys_size = lines(inner * wide), values_size = lines(outer * ceil_div(E, kLanes) * kLanes);
  const int64_t left_size = lines(block * inner), kept_size = lines(block * kept_row);
  const int64_t thread_size = keys_size + values_size + left_size + kept_size;
  Scratch<float> scratch(omp_get_max_threads() * thread_size);

#pragma omp parallel
  {
    float* keys = scratch.data + omp_get_thread_num() * thread_size;
    float *values = keys + keys_size, *left = values + values_size, *kept = left + left_size;
    int64_t packed = -1;  // the sample and head whose k and v are

#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < N * H * P; ++piece) {
      const int64_t b = piece / P, at = piece % P, n = b / H, h = b % H;
      if (packed != b) {
        packed = b;
        if (has_dq) pack_turned(k.at(0, n, h), k.row, D, S, inner, 0, keys);
        if (moves) pack(v.at(0, n, h), v.row, S, E, outer, 0, values);
      }
      if (has_dk) pack_turned(dk.at(at, n, h), dk.row, D, S, inner, inner - D, keys);
      if (has_dv) pack(dv.at(at, n, h), dv.row, S, E, outer, outer - S, values);
      const In* moved = has_dq ? dq.at(at, n, h) : nullptr;
      const In* none = nullptr;
      const float* query = q.at(0, n, h);
      for (int64_t start = 0; start < T; start += block) {
        const int64_t rows = lesser(block, T - start);
        const float* prob = p + (b * T + start) * S;
        Out* to = out + (((at * N + n) * T + start) * H + h) * E;
        if (!moves) {
          product(prob, S, rows, values, outer, to, H * E, E);
          continue;
        }
        for (int64_t i = 0; i < rows; ++i) {
          float* row = left + i * inner;
          const In* change = has_dq ? moved + (start + i) * dq.row : none;
          if (has_dq) scaled_sum(change, none, scale, row, D);
          if (has_dk) scaled_sum(change, query + (start + i) * q.row, scale, row + inner - D, D);
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
        product(kept, kept_row, rows, values, outer, to, H * E, E);
      }
    }
  }
}

}  // namespace

void DZ_KERNEL(attention_difference)(const void* dq, const void* dk, const void* dv, const float* q, const float* k,
                                     const float* v, const float* p, void* out, const int64_t* strides, double scale,
                                     int64_t P, int64_t N, int64_t H, int64_t T, int64_t S, int64_t D, int64_t E,
                                     bool half, bool out_half) {
  const auto run = [&](auto in, auto* to) {
    using In = decltype(in);
    attend(operand<In>(dq, strides), operand<In>(dk, strides + 4), operand<In>(dv, strides + 8),
           operand<float>(q, strides + 12), operand<float>(k, strides + 16), operand<float>(v, strides + 20), p, to,
           static_cast<float>(scale), P, N, H, T, S, D, E);
  };
  const auto from = [&](auto in) {
    if (out_half) {
      run(in, static_cast<Bf16*>(out));
    } else {
      run(in, static_cast<float*>(out));
    }
  };
  if (half) {
    from(Bf16{});
  } else {
    from(float{});
  }
}

}  // namespace dz
