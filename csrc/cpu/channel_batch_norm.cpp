#include "normed.h"

namespace dz {
namespace {

// Elements per block of the moments. Blocks are added in order, so the result does not depend on the number of threads.
constexpr int64_t kBlock = 4096;

// One channel of a [N, C, H, W] tensor.
struct Plane {
  const float* data;
  int64_t sn, sh, sw, H, W;

  bool contiguous() const { return sw == 1 && sh == W && sn == H * W; }
  // to[m] = this[m] - shift in the order of contiguous [N, H, W], for m in first .. last - 1, subtracted in float64.
  void gather(double shift, float* to, int64_t first, int64_t last) const {
    if (contiguous()) {
      for (int64_t m = first; m < last; ++m) to[m] = static_cast<float>(data[m] - shift);
      return;
    }
    for (int64_t m = first; m < last;) {
      const int64_t w = m % W, h = m / W % H, n = m / W / H;
      const int64_t run = min_of(W - w, last - m);
      const float* row = data + n * sn + h * sh + w * sw;
      for (int64_t i = 0; i < run; ++i) to[m + i] = static_cast<float>(row[i * sw] - shift);
      m += run;
    }
  }
};

// out = the change of the norm's output, after the ReLU with RELU, plus gap with GAP. Without ZC (constant statistics)
// the change is scale d.
template <bool ZC, bool RELU, bool GAP>
void apply(const float* d, const float* zc, const float* y, const float* gap, float* out,
           const Coefficients<float>& with, int64_t size) {
  const auto step = [&](auto get, int64_t i) {
    Vec v = get(d + i);
    v = ZC ? with.scale * (v - with.shift) - (with.zc_scale * get(zc + i) + with.offset) : with.scale * v;
    if constexpr (RELU) v = relu_change(get(y + i), v);
    if constexpr (GAP) v += get(gap + i);
    return v;
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    store(out + i, step([](const float* p) { return load<Vec>(p); }, i));
  }
  if (i < size) {
    const int64_t left = size - i;
    store_first(out + i, step([left](const float* p) { return load_partial(p, left); }, i), left);
  }
}

using Apply = void (*)(const float*, const float*, const float*, const float*, float*, const Coefficients<float>&,
                       int64_t);

Apply apply_for(bool zc, bool relu, bool gap) {
  if (zc) {
    return relu ? (gap ? &apply<true, true, true> : &apply<true, true, false>)
                : (gap ? &apply<true, false, true> : &apply<true, false, false>);
  }
  return relu ? (gap ? &apply<false, true, true> : &apply<false, true, false>)
              : (gap ? &apply<false, false, true> : &apply<false, false, false>);
}

// to[x] = maximum over `pool` rows, for whole vectors V of x in first .. width - 1. Returns the first x not written.
template <typename V>
DZ_INLINE int64_t rows_maximum(const float* from, float* to, int64_t pool, int64_t line, int64_t first, int64_t width) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  int64_t x = first;
  for (; x + lanes <= width; x += lanes) {
    V best = load<V>(from + x);
    for (int64_t i = 1; i < pool; ++i) best = max_of(best, load<V>(from + i * line + x));
    store(to + x, best);
  }
  return x;
}

// out[i] = maximum of from[pool i .. pool i + pool - 1].
void neighbours_maximum(const float* from, float* out, int64_t pool, int64_t size) {
  typedef int32_t Index __attribute__((vector_size(kLanes * sizeof(int32_t))));
  int64_t i = 0;
  if (pool == 2) {
    Index even;
    for (int32_t k = 0; k < kLanes; ++k) even[k] = 2 * k;
    for (; i + kLanes <= size; i += kLanes) {
      const Vec a = load<Vec>(from + 2 * i), b = load<Vec>(from + 2 * i + kLanes);
      store(out + i, max_of(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, even + 1)));
    }
  }
  for (; i < size; ++i) {
    float best = from[pool * i];
    for (int64_t j = 1; j < pool; ++j) best = max_of(best, from[pool * i + j]);
    out[i] = best;
  }
}

}  // namespace

DZ_KERNEL(channel_batch_norm, (const float* delta,      // [P, N, H, W]
                               const int64_t* channel,  // [P]
                               const float* x,          // [N, C, H, W] with strides xn, xc, xh, xw
                               const double* mean, const double* var, const double* gamma,  // [C] each
                               const float* y,    // [N, C, H, W] with strides yn, yc, yh, yw, or null: no activation
                               const float* gap,  // [N, C, H, W] with strides gn, gc, gh, gw, or null: no pooling
                               float* out,        // [P, N, H / pool, W / pool]
                               double eps, int64_t P, int64_t N, int64_t H, int64_t W, int64_t xn, int64_t xc,
                               int64_t xh, int64_t xw, int64_t yn, int64_t yc, int64_t yh, int64_t yw, int64_t gn,
                               int64_t gc, int64_t gh, int64_t gw, int64_t pool, bool training)) {
  const int64_t M = N * H * W, blocks = ceil_div(M, kBlock);
  if (M == 0) return;
  const int64_t threads = omp_get_max_threads();
  const Strips strips(N, H, W, pool, kBlock);
  const int64_t columns = W / pool;
  // Normally a thread handles whole perturbations, whose plane then stays in cache over the passes. With fewer
  // perturbations than threads the blocks of each are shared out instead. Both add the same blocks in the same order.
  const bool split = P < threads;
  const int64_t slots = split ? 1 : threads;
  const int64_t size = ceil_div(M, 16) * 16, padded_piece = ceil_div(strips.widest, 16) * 16;
  const bool copies_y = y != nullptr && !Plane{y, yn, yh, yw, H, W}.contiguous();
  const bool copies_gap = gap != nullptr && !Plane{gap, gn, gh, gw, H, W}.contiguous();
  Scratch<float> planes(slots * size * (training + copies_y + copies_gap)),
      pooled(gap != nullptr ? threads * 2 * padded_piece : 0);
  Scratch<Moments> partials(slots * (blocks + 3));
  const Apply run = apply_for(training, y != nullptr, gap != nullptr);

#pragma omp parallel if (!split)
  {
    const int64_t slot = split ? 0 : omp_get_thread_num();
    float* zc = planes.data + slot * size * (training + copies_y + copies_gap);
    float *y_copy = zc + (training ? size : 0), *gap_copy = y_copy + (copies_y ? size : 0);
    Moments* partial = partials.data + slot * (blocks + 3);
    int64_t cached_channel = -1;  // the channel whose planes were gathered last

#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; ++p) {
      const int64_t c = channel[p];
      const float* d = delta + p * M;
      const float* y_plane = copies_y ? y_copy : y != nullptr ? y + c * yc : nullptr;
      const float* gap_plane = copies_gap ? gap_copy : gap != nullptr ? gap + c * gc : nullptr;
      Coefficients<float> with = evaluation_coefficients(var[c] + eps, gamma[c]);

      if (cached_channel != c) {
        cached_channel = c;
#pragma omp parallel for schedule(static) if (split)
        for (int64_t k = 0; k < blocks; ++k) {
          const int64_t first = k * kBlock, last = min_of(M, first + kBlock);
          if (training) Plane{x + c * xc, xn, xh, xw, H, W}.gather(mean[c], zc, first, last);
          if (copies_y) Plane{y + c * yc, yn, yh, yw, H, W}.gather(0.0, y_copy, first, last);
          if (copies_gap) Plane{gap + c * gc, gn, gh, gw, H, W}.gather(0.0, gap_copy, first, last);
        }
      }
      if (training) {
        // The mean of 16 elements is close enough to the mean of all to avoid cancellation in the sums.
        const int64_t samples = min_of(M, 16);
        double sum = 0.0;
        for (int64_t k = 0; k < samples; ++k) sum += d[M * k / samples];
        const float shift = static_cast<float>(sum / static_cast<double>(samples));
#pragma omp parallel for schedule(static) if (split)
        for (int64_t k = 0; k < blocks; ++k) {
          const int64_t first = k * kBlock;
          partial[k] = moments(d + first, zc + first, shift, min_of(M - first, kBlock));
        }
        Moments sums = {};
        for (int64_t k = 0; k < blocks; ++k) sums += partial[k];
        with = training_coefficients(sums, shift, M, var[c] + eps, gamma[c], [&](double mean_d) {
          double after = 0.0;
          for (int64_t k = 0; k < blocks; ++k) {
            const int64_t first = k * kBlock;
            after += perturbed_squares(zc + first, d + first, mean_d, min_of(M - first, kBlock));
          }
          return after / static_cast<double>(M) + eps;
        });
      }

      const int64_t pieces = gap != nullptr ? strips.pieces : blocks;
#pragma omp parallel for schedule(static) if (split)
      for (int64_t k = 0; k < pieces; ++k) {
        const Piece piece = gap != nullptr ? strips.piece(k) : Piece{0, 0, k * kBlock, min_of(M, (k + 1) * kBlock)};
        const int64_t first = piece.begin, count = piece.end - first;
        float* unpooled =
            gap != nullptr ? pooled.data + (split ? omp_get_thread_num() : slot) * 2 * padded_piece : nullptr;
        run(d + first, zc + first, y_plane != nullptr ? y_plane + first : nullptr,
            gap != nullptr ? gap_plane + first : nullptr, gap != nullptr ? unpooled : out + p * M + first, with, count);
        if (gap == nullptr) continue;
        float *rows = unpooled + padded_piece, *to = rows;
        for (int64_t q = piece.first; q <= piece.last; ++q, to += columns * pool) {
          const float* from = unpooled + (strips.start(q) - first);
          int64_t at = rows_maximum<Vec>(from, to, pool, W, 0, columns * pool);
          if (kLanes > 4) at = rows_maximum<Float4>(from, to, pool, W, at, columns * pool);
          rows_maximum<float>(from, to, pool, W, at, columns * pool);
        }
        neighbours_maximum(rows, out + (p * strips.count + piece.first) * columns, pool, (to - rows) / pool);
      }
    }
  }
}

}  // namespace dz
