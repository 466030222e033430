#include "gemm.h"
#include "plane_norm.h"
#include "taps.h"

namespace dz {
namespace {

constexpr int64_t kBlock = 512;  // pixels at a time: what their taps read, and their results, stay in cache

// The convolution of the one channel that moves, for one weight and block after another. It runs twice, for the moments
// and for the result, and its values never leave the cache: writing and reading them would take longer.
struct Taken {
  const Window& window;
  const float *delta, *weight;  // [P, N, H, W], [P][O][T]
  int64_t N, O, kh, kw;
  const int64_t* places;      // [T] of a tap in `shifted`
  int64_t size, whole, held;  // floats of one part of `shifted`, and of all parts for an image; pixels of a row of d
  float *shifted, *d;         // scratch: [images of a block][parts][size], [O][held]

  // A part of `shifted` has the columns that one column of taps reads. With a stride of 1 the taps of such a column
  // read the same rows, further down; else a part is what one tap reads.
  static bool by_column(const Window& window) { return window.stride_h == 1; }

  // d[o, at] of pixels `first` to `last`, whole rows.
  void convolve(int64_t p, int64_t first, int64_t last) const {
    const int64_t Wo = window.Wo, T = kh * kw;
    float* to = shifted;
    by_image(window, first / Wo, last / Wo, [&](int64_t n, int64_t u, int64_t rows, int64_t) {
      const float* image = delta + (p * N + n) * window.H * window.W;
      const int64_t top = u * window.stride_h - window.pad_h;
      for (int64_t j = 0; j < kw; ++j) {
        const int64_t left = j * window.dil_w - window.pad_w;
        if (by_column(window)) {
          tap_columns(window, image, top, 1, window.rows_read(rows, kh), left, 1.0f, to + j * size);
          continue;
        }
        for (int64_t i = 0; i < kh; ++i) {
          tap_columns(window, image, top + i * window.dil_h, window.stride_h, rows, left, 1.0f,
                      to + (i * kw + j) * size);
        }
      }
      to += whole;
    });
    const float* from = shifted;
    by_image(window, first / Wo, last / Wo, [&](int64_t, int64_t, int64_t rows, int64_t at) {
      product_of_rows(weight + p * O * T, T, O, from, places, T, d + at * Wo, held, rows * Wo);
      from += whole;
    });
  }

  // The mean of eight pixels: near enough to the mean of all, so that sums about it do not cancel. shift [O]
  void make_shift(int64_t p, float* shift) const {
    const int64_t M = N * window.Ho * window.Wo, seen = lesser(M, 8), T = kh * kw;
    for (int64_t o = 0; o < O; ++o) shift[o] = 0.0f;
    for (int64_t t = 0; t < T; ++t) {
      double some = 0.0;
      const int64_t top = t / kw * window.dil_h - window.pad_h, left = t % kw * window.dil_w - window.pad_w;
      for (int64_t k = 0; k < seen; ++k) {
        some += tap_value(window, delta + p * N * window.H * window.W, M * k / seen, top, left);
      }
      const float mean = static_cast<float>(some / static_cast<double>(seen));
      for (int64_t o = 0; o < O; ++o) shift[o] += mean * weight[(p * O + o) * T + t];
    }
  }
};

DZ_INLINE float sum_of(Vec v) {
#pragma GCC unroll 4
  for (int H = kLanes / 2; H > 0; H /= 2) v += __builtin_shuffle(v, kLane ^ H);
  return v[0];
}

// As `moments`, for a block whose sums may stay in float32: at most 64 terms in a row at any level, then a tree.
Moments block_moments(const float* d, const float* zc, float shift, int64_t size) {
  if (size > kBlock) return moments(d, zc, shift, size);  // a long row
  Vec a[kSums] = {}, b[kSums] = {}, c[kSums] = {};
  const auto add = [&](int64_t k, Vec e, Vec z) {
    a[k] += e;
    b[k] += e * e;
    c[k] += e * z;
  };
  int64_t i = 0;
  for (; i + kSums * kLanes <= size; i += kSums * kLanes) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kSums; ++k) add(k, load<Vec>(d + i + k * kLanes) - shift, load<Vec>(zc + i + k * kLanes));
  }
  for (; i < size; i += kLanes) {
    const int64_t count = lesser(kLanes, size - i);
    const Vec e = load_some(d + i, count) - shift;
    add(0, kLane < static_cast<int32_t>(count) ? e : Vec{}, load_some(zc + i, count));
  }
  const auto all = [](const Vec* v) { return sum_of((v[0] + v[1]) + (v[2] + v[3])); };
  return {all(a), all(b), all(c)};
}

// out[m, o] = values[o, m]
template <typename Out>
void store_turned(const float* values, int64_t row, int64_t pixels, int64_t O, Out* out) {
  for (int64_t m = 0; m < pixels; m += kLanes, out += kLanes * O) {
    const int64_t count = lesser(kLanes, pixels - m);
    int64_t o = 0;
    for (; o + kLanes <= O; o += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) v[k] = load<Vec>(values + (o + k) * row + m);
      transpose<1>(v);
      Out* to = out + o;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i, to += O) {
        if (i < count) store_vec(to, v[i]);
      }
    }
    for (; o < O; ++o) {
      for (int64_t i = 0; i < count; ++i) store_one(out + i * O + o, values[o * row + m + i]);
    }
  }
}

// out[n, o] = mean of values[o, m] over the `pixels` pixels m of image n
template <typename Out>
void store_means(const float* values, int64_t row, int64_t images, int64_t pixels, int64_t O, Out* out) {
  const float share = 1.0f / static_cast<float>(pixels);
  for (int64_t n = 0; n < images; ++n, values += pixels, out += O) {
    int64_t o = 0;
    for (; o + kLanes <= O; o += kLanes) {
      Vec sum = {};
      for (int64_t m = 0; m < pixels; m += kLanes) {
        const int64_t count = lesser(kLanes, pixels - m);
        Vec v[kLanes];
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) v[k] = load<Vec>(values + (o + k) * row + m);
        transpose<1>(v);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) sum += i < count ? v[i] : Vec{};
      }
      store_vec(out + o, share * sum);
    }
    for (; o < O; ++o) {
      Vec sum = {};
      for (int64_t m = 0; m < pixels; m += kLanes) {
        sum += load_some(values + o * row + m, lesser(kLanes, pixels - m));
      }
      store_one(out + o, share * sum_of(sum));
    }
  }
}

template <typename Out>
void run(const float* delta, const int64_t* channel, const float* weight, const float* zc, const double* var,
         const double* gamma, const double* beta, Out* out, double eps, int64_t P, int64_t N, const Window& window,
         int64_t C, int64_t O, int64_t kh, int64_t kw, int64_t pool, bool training, bool relu, bool mean) {
  const int64_t Wo = window.Wo, M = N * window.Ho * Wo, T = kh * kw, threads = omp_get_max_threads();
  // For means a block has whole images.
  const int64_t image = window.Ho / pool * pool * Wo, columns = Wo / pool, pooled = window.Ho / pool * columns;
  const Strips blocks(N, window.Ho, Wo, 1, kBlock);
  const Strips strips(N, window.Ho, Wo, pool, mean ? greater(1, kBlock / image) * image : kBlock);
  // Means are taken from whole registers, of which the last one may begin anywhere.
  const int64_t widest = greater(blocks.widest, strips.widest) + (mean ? kLanes : 0);
  const int64_t held = ceil_div(widest, kWidest * kLanes) * kWidest * kLanes;
  const int64_t rows = lesser(window.Ho, held / Wo);  // of one image in a block, at most
  const bool by_column = Taken::by_column(window);
  const int64_t size = (by_column ? window.rows_read(rows, kh) : rows) * Wo, whole = (by_column ? kw : T) * size;
  const int64_t images = ceil_div(held / Wo, window.Ho) + 1;  // of which a block has rows, at most
  const int64_t windows = base_floats(strips);                // of one channel of a block
  const int64_t shifted = ceil_div(images * whole + kWidest * kLanes, 16) * 16,
                each = shifted + 2 * O * held + O * windows;
  Scratch<float> scratch(threads * each), taken(P * O * T);
  Scratch<int64_t> places(T);
  for (int64_t t = 0; t < T; ++t) {
    places.data[t] = by_column ? t % kw * size + t / kw * window.dil_h * Wo : t * size;
  }
  Scratch<Moments> sums(training ? P * blocks.pieces * O : 0);
  Scratch<float> shifts(P * O);
  Scratch<Coefficients> coefficients(P * O);

#pragma omp parallel
  {
    float* own = scratch.data + omp_get_thread_num() * each;
    float *const d = own + shifted, *const changed = d + O * held, *const made = changed + O * held;
    const Taken conv = {window, delta, taken.data, N, O, kh, kw, places.data, size, whole, held, own, d};

#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t o = 0; o < O; ++o) {
        for (int64_t t = 0; t < T; ++t) taken.data[(p * O + o) * T + t] = weight[(o * C + channel[p]) * T + t];
        coefficients.data[p * O + o] = still_coefficients(var[o] + eps, gamma[o]);
      }
      if (training) conv.make_shift(p, shifts.data + p * O);
    }
    if (training) {
      // Blocks outside, perturbations inside: the base of a block stays in cache for all of them.
#pragma omp for schedule(static)
      for (int64_t k = 0; k < blocks.pieces; ++k) {
        const int64_t first = blocks.begin(k), last = blocks.end(k);
        for (int64_t p = 0; p < P; ++p) {
          conv.convolve(p, first, last);
          for (int64_t o = 0; o < O; ++o) {
            sums.data[(p * blocks.pieces + k) * O + o] =
                block_moments(d + o * held, zc + o * M + first, shifts.data[p * O + o], last - first);
          }
        }
      }
#pragma omp for schedule(static)
      for (int64_t p = 0; p < P; ++p) {
        for (int64_t o = 0; o < O; ++o) {
          Moments all = {};
          for (int64_t k = 0; k < blocks.pieces; ++k) all += sums.data[(p * blocks.pieces + k) * O + o];
          coefficients.data[p * O + o] =
              moved_coefficients(all, shifts.data[p * O + o], M, var[o] + eps, gamma[o], [&](double mean_d) {
                double after = 0.0;
                for (int64_t k = 0; k < blocks.pieces; ++k) {
                  const int64_t first = blocks.begin(k), last = blocks.end(k);
                  conv.convolve(p, first, last);
                  after += moved_variance(zc + o * M + first, d + o * held, mean_d, last - first);
                }
                return after / static_cast<double>(M) + eps;
              });
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < strips.pieces; ++k) {
      const int64_t first = strips.begin(k), last = strips.end(k);
      const int64_t pixels = (strips.last(k) - strips.first(k) + 1) * columns;
      for (int64_t o = 0; o < O; ++o) {
        make_base(strips, strips.first(k), strips.last(k), zc + o * M + first, base_of(var[o] + eps, gamma[o], beta[o]),
                  made + o * windows);
      }
      for (int64_t p = 0; p < P; ++p) {
        Out* to =
            out +
            (mean ? p * N + strips.first(k) / strips.out_rows : (p * strips.count + strips.first(k)) * columns) * O;
        fetch_ahead<true>(to, (mean ? pixels / pooled : pixels) * O);
        conv.convolve(p, first, last);
        for (int64_t o = 0; o < O; ++o) {
          change_strips(strips, strips.first(k), strips.last(k), training, relu, d + o * held, zc + o * M + first,
                        made + o * windows, changed + o * held, coefficients.data[p * O + o],
                        base_of(var[o] + eps, gamma[o], beta[o]));
        }
        if (mean) {
          store_means(changed, held, pixels / pooled, pooled, O, to);
        } else {
          store_turned(changed, held, pixels, O, to);
        }
      }
    }
  }
}

}  // namespace

void DZ_KERNEL(channel_conv2d_batch_norm)(const float* delta, const int64_t* channel, const float* weight,
                                          const float* zc, const double* var, const double* gamma, const double* beta,
                                          void* out, double eps, int64_t P, int64_t N, int64_t H, int64_t W, int64_t Ho,
                                          int64_t Wo, int64_t C, int64_t O, int64_t kh, int64_t kw, int64_t stride_h,
                                          int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w,
                                          int64_t pool, bool training, bool relu, bool mean, bool half) {
  const Window window = {H, W, Ho, Wo, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w};
  if (N * O * Ho * Wo == 0 || P == 0) return;
  const auto to = [&](auto* values) {
    run(delta, channel, weight, zc, var, gamma, beta, values, eps, P, N, window, C, O, kh, kw, pool, training, relu,
        mean);
  };
  if (half) {
    to(static_cast<Bf16*>(out));
  } else {
    to(static_cast<float*>(out));
  }
}

}  // namespace dz
