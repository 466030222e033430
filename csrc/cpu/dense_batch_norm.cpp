#include "batch_norm.h"

namespace dz {
namespace {

// One perturbation is a run of N * H * W * C floats in which channels repeat with period C. It is processed in rows of
// lcm(C, 16) floats (or a multiple of that), so each column of a row has a fixed channel: coefficients are vectors, and
// no C leaves a remainder. Sums are in float32 within a block, and in float64 and in order over blocks: the result does
// not depend on the number of threads.
constexpr int64_t kMaxRows = 64;              // rows of a block, hence terms of a float32 sum
constexpr int64_t kBlock = 8192;              // floats of a block, approximately
constexpr int64_t kCache = 512 << 10;         // bytes of d per thread that stay in cache between the two passes
constexpr int kGroup = kLanes == 16 ? 4 : 2;  // vectors whose sums or coefficients stay in registers together
constexpr int64_t kMoments = 3;               // sums of e = d - shift, of e^2 and of zc e
enum Coefficient { kShift, kScale, kZcScale, kOffset, kCoefficients };  // the members of Coefficients, in order

int64_t row_length(int64_t C) {
  int64_t twos = C & -C;
  if (twos > 16) twos = 16;
  const int64_t least = C * (16 / twos);
  return least < 64 ? least * ceil_div(64, least) : least;
}

// How a run of floats divides into rows.
struct Rows {
  Rows(int64_t size, int64_t length)
      : vectors(length / kLanes), full(size / length), rest((size - full * length) / kLanes), tail(size % kLanes) {}
  int64_t vectors;  // vectors of a row
  int64_t full;     // full rows
  int64_t rest;     // full vectors after them
  int64_t tail;     // floats after those
};

// Loads the first `count` lanes; the others are 0.
template <typename T>
DZ_INLINE Vec load_first(const T* from, int64_t count) {
  float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = to_float(from[i]);
  return load<Vec>(values);
}

template <int N>
struct Size {
  static constexpr int value = N;
};

DZ_INLINE void store_sums(const LaneSums& from, float* to, int64_t length) {
  store(to, from.e);
  store(to + length, from.e2);
  store(to + 2 * length, from.ze);
}

// Sums over `rows` rows for the GROUP vectors that d points at.
template <int GROUP, typename In>
DZ_INLINE void add_rows(const In* d, const float* zc, const float* shift, float* sums, int64_t rows, int64_t length) {
  LaneSums own[GROUP];
  Vec from[GROUP];
#pragma GCC unroll 4
  for (int g = 0; g < GROUP; ++g) from[g] = load<Vec>(shift + g * kLanes);
  for (int64_t r = 0; r < rows; ++r, d += length, zc += length) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUP; ++g) {
      own[g].add(load_vec(d + g * kLanes) - from[g], load<Vec>(zc + g * kLanes));
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < GROUP; ++g) store_sums(own[g], sums + g * kLanes, length);
}

DZ_INLINE void add_one(Vec e, Vec zc, float* sums, int64_t length) {
  LaneSums own = {load<Vec>(sums), load<Vec>(sums + length), load<Vec>(sums + 2 * length)};
  own.add(e, zc);
  store_sums(own, sums, length);
}

// sums[3, length] over one block of `size` floats.
template <typename In>
void moments(const In* d, const float* zc, const float* shift, float* sums, int64_t size, int64_t length) {
  const Rows rows(size, length);
  for (int64_t j = 0; j < rows.vectors;) {
    const int64_t at = j * kLanes, left = rows.vectors - j;
    const auto run = [&](auto group) {
      constexpr int size = decltype(group)::value;
      add_rows<size>(d + at, zc + at, shift + at, sums + at, rows.full, length);
      j += size;
    };
    if (left >= kGroup + 2 || left == kGroup) {
      run(Size<kGroup>());
    } else if (left >= 3 && kGroup > 3) {
      run(Size<3>());
    } else if (left >= 2) {
      run(Size<2>());
    } else {
      run(Size<1>());
    }
  }
  const int64_t done = rows.full * length;
  int64_t at = 0;
  for (; at < rows.rest * kLanes; at += kLanes) {
    add_one(load_vec(d + done + at) - load<Vec>(shift + at), load<Vec>(zc + done + at), sums + at, length);
  }
  if (rows.tail != 0) {
    const Vec e = load_first(d + done + at, rows.tail) - load_first(shift + at, rows.tail);
    add_one(e, load_first(zc + done + at, rows.tail), sums + at, length);
  }
}

struct NoResidual {};
DZ_INLINE const NoResidual* skip(const NoResidual* p, int64_t) { return p; }
template <typename T>
DZ_INLINE const T* skip(const T* p, int64_t count) {
  return p + count;
}
DZ_INLINE Vec add(Vec v, const NoResidual*, int64_t) { return v; }
template <typename T>
DZ_INLINE Vec add(Vec v, const T* residual, int64_t at) {
  return v + load_vec(residual + at);
}
DZ_INLINE Vec add_first(Vec v, const NoResidual*, int64_t) { return v; }
template <typename T>
DZ_INLINE Vec add_first(Vec v, const T* residual, int64_t count) {
  return v + load_first(residual, count);
}

DZ_INLINE Coefficients<Vec> coefficients_at(const float* from, int64_t length) {
  return {load<Vec>(from + kShift * length), load<Vec>(from + kScale * length), load<Vec>(from + kZcScale * length),
          load<Vec>(from + kOffset * length)};
}

// Applies the coefficients to `rows` rows of the GROUP vectors that d points at.
template <int GROUP, bool RELU, typename In, typename Residual, typename Out>
DZ_INLINE void apply_rows(const In* d, const float* zc, const Residual* residual, const float* y, Out* out,
                          const float* coefficients, int64_t rows, int64_t length) {
  Coefficients<Vec> own[GROUP];
#pragma GCC unroll 4
  for (int g = 0; g < GROUP; ++g) own[g] = coefficients_at(coefficients + g * kLanes, length);
  for (int64_t at = 0; at < rows * length; at += length) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUP; ++g) {
      const int64_t i = at + g * kLanes;
      Vec v = add(own[g].change(load_vec(d + i), load<Vec>(zc + i)), residual, i);
      if constexpr (RELU) v = relu_change(load<Vec>(y + i), v);
      store_vec(out + i, v);
    }
  }
}

// Change of the norm's output plus residual, after the ReLU, for a run of `size` floats that starts at channel 0.
template <bool RELU, typename In, typename Residual, typename Out>
void apply(const In* d, const float* zc, const Residual* residual, const float* y, Out* out, const float* coefficients,
           int64_t size, int64_t length) {
  const Rows rows(size, length);
  for (int64_t at = 0; at < length && rows.full > 0;) {
    const float* base = RELU ? y + at : nullptr;
    if (length - at >= kGroup * kLanes) {
      apply_rows<kGroup, RELU>(d + at, zc + at, skip(residual, at), base, out + at, coefficients + at, rows.full,
                               length);
      at += kGroup * kLanes;
    } else {
      apply_rows<1, RELU>(d + at, zc + at, skip(residual, at), base, out + at, coefficients + at, rows.full, length);
      at += kLanes;
    }
  }
  int64_t i = rows.full * length, column = 0;
  for (; column < rows.rest * kLanes; column += kLanes, i += kLanes) {
    apply_rows<1, RELU>(d + i, zc + i, skip(residual, i), RELU ? y + i : nullptr, out + i, coefficients + column, 1,
                        length);
  }
  if (const int64_t left = rows.tail; left != 0) {
    const Coefficients<Vec> own = coefficients_at(coefficients + column, length);
    Vec v = add_first(own.change(load_first(d + i, left), load_first(zc + i, left)), skip(residual, i), left);
    if constexpr (RELU) v = relu_change(load_first(y + i, left), v);
    store_first(out + i, v, left);
  }
}

// One row of pooling windows: the maximum of change + gap over `pool` rows, `stride` floats apart, and `pool` columns.
// `row` is scratch.
template <typename Out>
void pool_row(const float* change, const float* gap, float* row, Out* out, int64_t pool, int64_t stride,
              int64_t columns, int64_t C) {
  if (pool == 2 && C >= kLanes) {
    const float *below = change + stride, *gap_below = gap + stride;
    for (int64_t v = 0; v < columns; ++v, out += C) {
      for (int64_t c = 0; c < C; c += kLanes) {  // the last vector overlaps the one before it
        const int64_t at = min_of(c, C - kLanes), x = 2 * v * C + at;
        const Vec left =
            max_of(load<Vec>(change + x) + load<Vec>(gap + x), load<Vec>(below + x) + load<Vec>(gap_below + x));
        const Vec right = max_of(load<Vec>(change + x + C) + load<Vec>(gap + x + C),
                                 load<Vec>(below + x + C) + load<Vec>(gap_below + x + C));
        store_vec(out + at, max_of(left, right));
      }
    }
    return;
  }
  const int64_t width = columns * pool * C;
  int64_t x = 0;
  for (; x + kLanes <= width; x += kLanes) {
    Vec best = load<Vec>(change + x) + load<Vec>(gap + x);
    for (int64_t i = 1; i < pool; ++i) {
      best = max_of(best, load<Vec>(change + i * stride + x) + load<Vec>(gap + i * stride + x));
    }
    store(row + x, best);
  }
  for (; x < width; ++x) {
    float best = change[x] + gap[x];
    for (int64_t i = 1; i < pool; ++i) best = max_of(best, change[i * stride + x] + gap[i * stride + x]);
    row[x] = best;
  }
  for (int64_t v = 0; v < columns; ++v, row += pool * C, out += C) {
    if (C >= kLanes) {
      for (int64_t c = 0; c < C; c += kLanes) {  // the last vector overlaps the one before it
        const int64_t at = min_of(c, C - kLanes);
        Vec best = load<Vec>(row + at);
        for (int64_t j = 1; j < pool; ++j) best = max_of(best, load<Vec>(row + j * C + at));
        store_vec(out + at, best);
      }
    } else {
      for (int64_t c = 0; c < C; ++c) {
        float best = row[c];
        for (int64_t j = 1; j < pool; ++j) best = max_of(best, row[j * C + c]);
        store_one(out + c, best);
      }
    }
  }
}

// The arguments that do not depend on the types of delta and of the result.
struct Norm {
  const float* zc;
  const double *var, *gamma;
  const void* residual;
  const int64_t* residual_channel;
  const float *y, *gap;
  double eps;
  int64_t P, N, H, W, C, pool;
  bool training, residual_half;
  int64_t size, length;  // floats of a perturbation, and of a row
};

// The mean of eight pixels is close enough to the mean of all to avoid cancellation in the sums.
template <typename In>
void make_shift(const Norm& norm, const In* d, float* shift) {
  const int64_t pixels = norm.size / norm.C, count = min_of(pixels, 8);
  for (int64_t c = 0; c < norm.C; ++c) {
    double sum = 0.0;
    for (int64_t k = 0; k < count; ++k) sum += to_float(d[pixels * k / count * norm.C + c]);
    shift[c] = static_cast<float>(sum / static_cast<double>(count));
  }
  for (int64_t i = norm.C; i < norm.length; ++i) shift[i] = shift[i - norm.C];
}

// The mean of (zc + d - mean_d)^2 over one channel.
template <typename In>
double perturbed_variance(const float* zc, const In* d, double mean_d, int64_t size, int64_t C) {
  double total = 0.0;
  for (int64_t i = 0; i < size; i += C) {
    const double perturbed = zc[i] + (to_float(d[i]) - mean_d);
    total += perturbed * perturbed;
  }
  return total / static_cast<double>(size / C);
}

DZ_INLINE void store_coefficients(const Coefficients<float>& from, float* to, int64_t length) {
  to[kShift * length] = from.shift;
  to[kScale * length] = from.scale;
  to[kZcScale * length] = from.zc_scale;
  to[kOffset * length] = from.offset;
}

// Coefficients of one perturbation from its sums [blocks, kMoments, length]. `total` is scratch [kMoments, length].
template <typename In>
void finish(const Norm& norm, const In* d, const float* sums, int64_t blocks, double* total, float* coefficients) {
  const int64_t length = norm.length, C = norm.C;
  for (int64_t i = 0; i < kMoments * length; ++i) total[i] = 0.0;
  for (int64_t b = 0; b < blocks; ++b, sums += kMoments * length) {
    for (int64_t i = 0; i < kMoments * length; i += 8) {
      store(total + i, load<Double8>(total + i) + widen(load<Float8>(sums + i)));
    }
  }
  for (int64_t c = 0; c < C; ++c) {
    const double before = norm.var[c] + norm.eps;
    float* to = coefficients + c;
    if (!norm.training) {
      store_coefficients(evaluation_coefficients(before, norm.gamma[c]), to, length);
      continue;
    }
    Moments all = {};
    for (int64_t i = c; i < length; i += C) all += {total[i], total[length + i], total[2 * length + i]};
    const auto variance = [&](double mean_d) {
      return perturbed_variance(norm.zc + c, d + c, mean_d, norm.size, C) + norm.eps;
    };
    store_coefficients(training_coefficients(all, to[kShift * length], norm.size / C, before, norm.gamma[c], variance),
                       to, length);
  }
  for (int64_t i = C; i < length; ++i) {
    for (int64_t k = 0; k < kCoefficients; ++k) coefficients[k * length + i] = coefficients[k * length + i - C];
  }
}

// Turns the residual and the ReLU into template arguments. `scattered` holds zeros before and after.
template <typename In, typename Out>
void apply_block(const Norm& norm, int64_t p, const In* d, const float* coefficients, int64_t first, int64_t count,
                 float* scattered, Out* out) {
  const float *zc = norm.zc + first, *y = norm.y != nullptr ? norm.y + first : nullptr;
  const auto run = [&](const auto* residual) {
    if (y != nullptr) {
      apply<true>(d, zc, residual, y, out, coefficients, count, norm.length);
    } else {
      apply<false>(d, zc, residual, y, out, coefficients, count, norm.length);
    }
  };
  const int64_t at = p * norm.size + first;
  if (norm.residual == nullptr) {
    run(static_cast<const NoResidual*>(nullptr));
  } else if (norm.residual_channel != nullptr) {
    const float* from = static_cast<const float*>(norm.residual) + at / norm.C;
    float* to = scattered + norm.residual_channel[p];
    for (int64_t i = 0; i < count; i += norm.C) to[i] = *from++;
    run(static_cast<const float*>(scattered));
    for (int64_t i = 0; i < count; i += norm.C) to[i] = 0.0f;
  } else if (norm.residual_half) {
    run(static_cast<const Bf16*>(norm.residual) + at);
  } else {
    run(static_cast<const float*>(norm.residual) + at);
  }
}

template <typename In, typename Out>
void dense(const Norm& norm, const In* delta, Out* out) {
  const int64_t P = norm.P, C = norm.C, size = norm.size, length = norm.length, pool = norm.pool;
  const int64_t block = length * max_of(8, min_of(kMaxRows, kBlock / length)), blocks = ceil_div(size, block);
  const int64_t threads = omp_get_max_threads();
  // A group of perturbations shares each block of zc, y and gap while it is in cache. The group is as large as lets its
  // differences stay in cache between the passes; where not even one perturbation fits, it is 8.
  const int64_t fit = threads * kCache / (size * static_cast<int64_t>(sizeof(In)));
  const int64_t group = max_of(1, min_of(P, fit > 0 ? fit : 8));

  // The second pass runs over blocks of pixels, or of whole rows of pooling windows.
  const Strips strips(norm.N, norm.H, norm.W * C, pool, block);
  const int64_t columns = norm.W / pool, pixels = max_of(1, block / C);
  const int64_t pieces = pool > 1 ? strips.pieces : ceil_div(size, pixels * C);
  const int64_t widest = pool > 1 ? strips.widest : pixels * C;
  const int64_t padded_piece = ceil_div(widest, 16) * 16;
  Scratch<float> sums(norm.training ? group * blocks * kMoments * length : 0);
  Scratch<float> coefficients(group * kCoefficients * length), planes(threads * 3 * padded_piece);
  Scratch<double> totals(threads * kMoments * length);

#pragma omp parallel
  {
    float* scattered = planes.data + omp_get_thread_num() * 3 * padded_piece;
    float *change = scattered + padded_piece, *row = change + padded_piece;
    double* total = totals.data + omp_get_thread_num() * kMoments * length;
    for (int64_t i = 0; i < padded_piece && norm.residual_channel != nullptr; ++i) scattered[i] = 0.0f;

    for (int64_t p0 = 0; p0 < P; p0 += group) {
      const int64_t count = min_of(group, P - p0);
      const In* d = delta + p0 * size;
      if (norm.training) {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < count; ++p) {
          make_shift(norm, d + p * size, coefficients.data + p * kCoefficients * length + kShift * length);
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t first = b * block, part = min_of(block, size - first);
          for (int64_t p = 0; p < count; ++p) {
            moments(d + p * size + first, norm.zc + first, coefficients.data + p * kCoefficients * length,
                    sums.data + (p * blocks + b) * kMoments * length, part, length);
          }
        }
      }
#pragma omp for schedule(static)
      for (int64_t p = 0; p < count; ++p) {
        finish(norm, d + p * size, sums.data + p * blocks * kMoments * length, norm.training ? blocks : 0, total,
               coefficients.data + p * kCoefficients * length);
      }
#pragma omp for schedule(static)
      for (int64_t k = 0; k < pieces; ++k) {
        for (int64_t p = 0; p < count; ++p) {
          const float* own = coefficients.data + p * kCoefficients * length;
          if (pool == 1) {
            const int64_t first = k * pixels * C, part = min_of(pixels * C, size - first);
            apply_block(norm, p0 + p, d + p * size + first, own, first, part, scattered, out + (p0 + p) * size + first);
            continue;
          }
          const Piece piece = strips.piece(k);
          apply_block(norm, p0 + p, d + p * size + piece.begin, own, piece.begin, piece.end - piece.begin, scattered,
                      change);
          for (int64_t q = piece.first; q <= piece.last; ++q) {
            pool_row(change + (strips.start(q) - piece.begin), norm.gap + strips.start(q), row,
                     out + ((p0 + p) * strips.count + q) * columns * C, pool, strips.line, columns, C);
          }
        }
      }
    }
  }
}

}  // namespace

DZ_KERNEL(dense_batch_norm, (const void* delta,  // [P, N, H, W, C] float32, or bfloat16 with delta_half
                             const float* zc,    // [N, H, W, C]
                             const double* var, const double* gamma,  // [C] each
                             const void* residual,  // null, or [P, N, H, W, C] float32 (bfloat16 with residual_half);
                                                    // [P, N, H, W] float32 with residual_channel
                             const int64_t* residual_channel,  // [P] or null
                             const float* y,                   // [N, H, W, C] or null: no activation
                             const float* gap,                 // [N, H, W, C] or null: no pooling
                             void* out,  // [P, N, H / pool, W / pool, C] float32, or bfloat16 with out_half
                             double eps, int64_t P, int64_t N, int64_t H, int64_t W, int64_t C, int64_t pool,
                             bool training, bool delta_half, bool residual_half, bool out_half)) {
  const Norm norm = {zc,   var,      gamma,         residual,      residual_channel, y, gap, eps, P, N, H, W, C,
                     pool, training, residual_half, N * H * W * C, row_length(C)};
  if (norm.size == 0 || P == 0) return;
  const auto run = [&](const auto* from) {
    if (out_half) {
      dense(norm, from, static_cast<Bf16*>(out));
    } else {
      dense(norm, from, static_cast<float*>(out));
    }
  };
  if (delta_half) {
    run(static_cast<const Bf16*>(delta));
  } else {
    run(static_cast<const float*>(delta));
  }
}

}  // namespace dz
