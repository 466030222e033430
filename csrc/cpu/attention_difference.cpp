#include "softmax.h"

namespace dz {
namespace {

constexpr int64_t kPanel = kLanes == 16 ? 4 : 2;  // registers of columns in a panel
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

DZ_INLINE Vec load_first(const float* p, int64_t n) { return load_some(p, n); }

DZ_INLINE Vec load_first(const Bf16* p, int64_t n) {
  if (n == kLanes) return load_vec(p);
  Bf16 values[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = p[i];
  return load_vec(values);
}

#if defined(__AVX512F__)
constexpr Mask kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
constexpr Mask kLane = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr Mask kLane = {0, 1, 2, 3};
#endif

// The squares of H lanes off the diagonal change places.
template <int H>
DZ_INLINE void transpose(Vec (&v)[kLanes]) {
  constexpr int lanes = kLanes;
  const Mask low = (kLane & H) != 0 ? kLane + (lanes - H) : kLane;
  const Mask high = (kLane & H) != 0 ? kLane + lanes : kLane + H;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & H) == 0) {
      const Vec a = v[i], b = v[i + H];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + H] = __builtin_shuffle(a, b, high);
    }
  }
  if constexpr (2 * H < kLanes) transpose<2 * H>(v);
}

// A matrix with `depth` rows that is multiplied from the left lies in panels of kPanel registers of columns, the last
// one narrower, each [depth][its columns], filled up with zeros. These two write some of its rows, beginning at
// `first`.

// The columns are the rows of `from`, which has `rows` values each.
template <typename T>
void pack_turned(const T* from, int64_t stride, int64_t rows, int64_t columns, int64_t depth, int64_t first,
                 float* to) {
  const int64_t all = ceil_div(columns, kLanes) * kLanes;
  for (int64_t c = 0; c < all; c += kLanes) {
    const int64_t panel = c / (kPanel * kLanes) * (kPanel * kLanes), width = lesser(kPanel * kLanes, all - panel);
    const int64_t count = lesser(kLanes, columns - c);
    float* out = to + panel * depth + first * width + (c - panel);
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t size = lesser(kLanes, rows - r);
      Vec v[kLanes];
      if (count == kLanes && size == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = load_vec(from + (c + i) * stride + r);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = i < count ? load_first(from + (c + i) * stride + r, size) : Vec{};
      }
      transpose<1>(v);
      if (size == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(out + (r + i) * width, v[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          if (i < size) store(out + (r + i) * width, v[i]);
        }
      }
    }
  }
}

template <typename T>
void pack(const T* from, int64_t stride, int64_t rows, int64_t columns, int64_t depth, int64_t first, float* to) {
  const int64_t all = ceil_div(columns, kLanes) * kLanes;
  for (int64_t c = 0; c < all; c += kLanes) {
    const int64_t panel = c / (kPanel * kLanes) * (kPanel * kLanes), width = lesser(kPanel * kLanes, all - panel);
    const int64_t count = lesser(kLanes, columns - c);
    float* out = to + panel * depth + first * width + (c - panel);
    for (int64_t r = 0; r < rows; ++r) store(out + r * width, load_first(from + r * stride + c, count));
  }
}

// out[i, j] = sum_t left[i, t] * panel[t, j] for ROWS rows and REGISTERS registers of columns. The accumulators never
// leave registers; the sum runs over t in order, in every tile shape alike.
template <int ROWS, int REGISTERS, typename Out>
DZ_INLINE void tile(const float* left, int64_t left_row, const float* panel, int64_t depth, Out* out, int64_t out_row,
                    int64_t columns) {
  Vec sum[ROWS][REGISTERS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < REGISTERS; ++r) sum[i][r] = Vec{};
  }
  for (int64_t t = 0; t < depth; ++t) {
    Vec right[REGISTERS];
#pragma GCC unroll 4
    for (int r = 0; r < REGISTERS; ++r) right[r] = load<Vec>(panel + (t * REGISTERS + r) * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec value = left[i * left_row + t] - Vec{};
#pragma GCC unroll 4
      for (int r = 0; r < REGISTERS; ++r) sum[i][r] += value * right[r];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < REGISTERS; ++r) {
      Out* to = out + i * out_row + r * kLanes;
      const int64_t count = columns - r * kLanes;
      if (count >= kLanes) {
        store_vec(to, sum[i][r]);
      } else if (count > 0) {
        store_first(to, sum[i][r], count);
      }
    }
  }
}

// The last tile, which may be half of one, overlaps the one before it and writes the same values again.
template <int ROWS, int REGISTERS, typename Out>
void panel_product(const float* left, int64_t left_row, int64_t rows, const float* panel, int64_t depth, Out* out,
                   int64_t out_row, int64_t columns) {
  constexpr int half = (ROWS + 1) / 2;
  int64_t i = 0;
  for (; i + half < rows && rows >= ROWS; i += ROWS) {
    const int64_t at = lesser(i, rows - ROWS);
    tile<ROWS, REGISTERS>(left + at * left_row, left_row, panel, depth, out + at * out_row, out_row, columns);
  }
  if (i >= rows) return;
  if constexpr (ROWS > 1) {
    const int64_t at = rows >= ROWS ? rows - half : 0;
    panel_product<half, REGISTERS>(left + at * left_row, left_row, rows - at, panel, depth, out + at * out_row, out_row,
                                   columns);
  } else {
    tile<1, REGISTERS>(left + i * left_row, left_row, panel, depth, out + i * out_row, out_row, columns);
  }
}

// Rows of a tile: its sums fill at most half of the 32 (AVX-512) or three quarters of the 16 registers.
constexpr int tile_rows(int registers) { return kLanes == 16 ? 8 / ((registers + 1) / 2) : registers == 1 ? 8 : 6; }

// The panel that has room for `columns`, but no whole register too many.
template <int REGISTERS, typename Out>
void fitting_product(const float* left, int64_t left_row, int64_t rows, const float* panel, int64_t depth, Out* out,
                     int64_t out_row, int64_t columns) {
  if (columns > (REGISTERS - 1) * kLanes) {
    panel_product<tile_rows(REGISTERS), REGISTERS>(left, left_row, rows, panel, depth, out, out_row, columns);
  } else if constexpr (REGISTERS > 1) {
    fitting_product<REGISTERS - 1>(left, left_row, rows, panel, depth, out, out_row, columns);
  }
}

// out[rows, columns] = left[rows, depth] times a packed matrix.
template <typename Out>
void product(const float* left, int64_t left_row, int64_t rows, const float* packed, int64_t depth, Out* out,
             int64_t out_row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kPanel * kLanes) {
    fitting_product<kPanel>(left, left_row, rows, packed + c * depth, depth, out + c, out_row, columns - c);
  }
}

// to = scale * (a + b) for one row; either may be missing.
template <typename A, typename B>
void scaled_sum(const A* a, const B* b, float scale, float* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = lesser(kLanes, size - i);
    Vec v = {};
    if (a != nullptr) v += load_first(a + i, count);
    if (b != nullptr) v += load_first(b + i, count);
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
