#include "epilogue.h"
#include "gemm.h"
#include "normed.h"
#include "taps.h"

namespace dz {
namespace {

constexpr int64_t kBlock = kFloatBlock;  // pixels per block: their inputs and results stay in cache

// Layout of the im2col copy of a piece of at most `row` output pixels. The copy of an image consists of parts. With a
// vertical stride of 1 all taps of a kernel column share one part, each at its own row offset; otherwise every tap has
// a part of its own.
struct Patches {
  Patches(const Window& window, int64_t kh_, int64_t kw_, int64_t row)
      : kh(kh_), kw(kw_), by_column(window.stride_h == 1) {
    const int64_t rows = min_of(window.Ho, row / window.Wo);  // of one image in a piece, maximum
    part = (by_column ? window.rows_read(rows, kh) : rows) * window.Wo;
    image = (by_column ? kw : kh * kw) * part;
    images = ceil_div(row / window.Wo, window.Ho) + 1;  // that a piece touches, maximum
  }
  int64_t offset(const Window& window, int64_t tap) const {
    return by_column ? tap % kw * part + tap / kw * window.dil_h * window.Wo : tap * part;
  }
  int64_t floats() const { return ceil_div(images * image + kPanelRegisters * kLanes, 16) * 16; }

  int64_t kh, kw;
  bool by_column;
  int64_t part, image;  // floats of a part, and of all parts of an image
  int64_t images;       // maximum images of a piece
};

// Producer for one perturbed input channel. The convolution runs twice, for the moments and for the result, and its
// values stay in cache: storing and reloading them would take longer.
struct Channel {
  static constexpr bool kFloatSums = true;

  Channel(const Window& window_, const float* delta_, const int64_t* channel, const float* weight_, int64_t P,
          int64_t N_, int64_t C, int64_t O, int64_t kh, int64_t kw, int64_t row_)
      : window(window_),
        delta(delta_),
        N(N_),
        taps(kh * kw),
        patches(window_, kh, kw, row_),
        weight(P * O * taps),
        offsets(taps),
        blocks(N_, window_.Ho, window_.Wo, 1, kBlock),
        planes(O),
        row(row_) {
    for (int64_t t = 0; t < taps; ++t) offsets.data[t] = patches.offset(window, t);
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t o = 0; o < O; ++o) {
        const float* from = weight_ + (o * C + channel[p]) * taps;
        for (int64_t t = 0; t < taps; ++t) weight.data[(p * O + o) * taps + t] = from[t];
      }
    }
  }

  int64_t floats() const { return patches.floats() + planes * row; }
  int64_t channel(int64_t, int64_t plane) const { return plane; }

  const float* produce(int64_t p, int64_t first, int64_t last, float* scratch) const {
    const int64_t Wo = window.Wo, kh = patches.kh, kw = patches.kw;
    float *const d = scratch + patches.floats(), *to = scratch;
    by_image(window, first / Wo, last / Wo, [&](int64_t n, int64_t u, int64_t rows, int64_t) {
      const float* image = delta + (p * N + n) * window.H * window.W;
      const int64_t top = u * window.stride_h - window.pad_h;
      for (int64_t j = 0; j < kw; ++j) {
        const int64_t left = j * window.dil_w - window.pad_w;
        if (patches.by_column) {
          tap_columns(window, image, top, 1, window.rows_read(rows, kh), left, 1.0f, to + j * patches.part);
          continue;
        }
        for (int64_t i = 0; i < kh; ++i) {
          tap_columns(window, image, top + i * window.dil_h, window.stride_h, rows, left, 1.0f,
                      to + (i * kw + j) * patches.part);
        }
      }
      to += patches.image;
    });
    const float* from = scratch;
    by_image(window, first / Wo, last / Wo, [&](int64_t, int64_t, int64_t rows, int64_t at) {
      product_of_rows(weight.data + p * planes * taps, taps, planes, from, offsets.data, taps, d + at * Wo, row,
                      rows * Wo);
      from += patches.image;
    });
    return d;
  }

  // The mean of d over eight pixels.
  void shift(int64_t p, float* to) const {
    const int64_t M = N * window.Ho * window.Wo, count = min_of(M, 8), kw = patches.kw;
    for (int64_t o = 0; o < planes; ++o) to[o] = 0.0f;
    for (int64_t t = 0; t < taps; ++t) {
      double sum = 0.0;
      const int64_t top = t / kw * window.dil_h - window.pad_h, left = t % kw * window.dil_w - window.pad_w;
      for (int64_t k = 0; k < count; ++k) {
        sum += tap_value(window, delta + p * N * window.H * window.W, M * k / count, top, left);
      }
      const float mean = static_cast<float>(sum / static_cast<double>(count));
      for (int64_t o = 0; o < planes; ++o) to[o] += mean * weight.data[(p * planes + o) * taps + t];
    }
  }

  const Window& window;
  const float* delta;  // [P, N, H, W]
  int64_t N, taps;
  Patches patches;
  Scratch<float> weight;     // [P][O][taps]
  Scratch<int64_t> offsets;  // [taps], where the input of a tap starts in the copy of an image
  Strips blocks;
  int64_t planes, row;
};

// out[m, o] = values[o, m]
template <typename Out>
DZ_INLINE void store_transposed(const float* values, int64_t row, int64_t pixels, int64_t O, Out* out) {
  for (int64_t m = 0; m < pixels; m += kLanes, out += kLanes * O) {
    const int64_t count = min_of(kLanes, pixels - m);
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
  const float inverse = 1.0f / static_cast<float>(pixels);
  for (int64_t n = 0; n < images; ++n, values += pixels, out += O) {
    int64_t o = 0;
    for (; o + kLanes <= O; o += kLanes) {
      Vec sum = {};
      for (int64_t m = 0; m < pixels; m += kLanes) {
        const int64_t count = min_of(kLanes, pixels - m);
        Vec v[kLanes];
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) v[k] = load<Vec>(values + (o + k) * row + m);
        transpose<1>(v);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) sum += i < count ? v[i] : Vec{};
      }
      store_vec(out + o, inverse * sum);
    }
    for (; o < O; ++o) {
      Vec sum = {};
      for (int64_t m = 0; m < pixels; m += kLanes) {
        sum += load_partial(values + o * row + m, min_of(kLanes, pixels - m));
      }
      store_one(out + o, inverse * sum_of(sum));
    }
  }
}

// Epilogue that writes channels-last, out [P, N, Ho / pool, Wo / pool, O], or the mean over each image, out [P, N, O].
template <typename Out>
struct ChannelsLast {
  const BatchNorm& norm;
  const double* beta;  // [O]
  Strips strips;
  int64_t N, O, row, columns, pooled;  // row: scratch floats per channel; pooled: pixels of an image after pooling
  bool relu, mean;
  Out* out;

  int64_t floats() const { return O * (row + base_floats(strips)); }
  float* base(float* scratch, int64_t channel) const { return scratch + O * row + channel * base_floats(strips); }
  int64_t pixels(const Piece& piece) const { return (piece.last - piece.first + 1) * columns; }
  Out* to(int64_t p, const Piece& piece) const {
    return out + (mean ? p * N + piece.first / strips.out_rows : (p * strips.count + piece.first) * columns) * O;
  }

  void prepare(const Piece& piece, int64_t, int64_t channel, float* scratch) const {
    make_base(strips, piece.first, piece.last, norm.base(channel, piece.begin),
              affine(norm.before(channel), norm.gamma[channel], beta[channel]), base(scratch, channel));
  }
  void prefetch(int64_t p, const Piece& piece) const {
    dz::prefetch<true>(to(p, piece), (mean ? pixels(piece) / pooled : pixels(piece)) * O);
  }
  void change(int64_t, const Piece& piece, int64_t plane, const float* d, const float* zc,
              const Coefficients<float>& with, float* scratch) const {
    change_strips(strips, piece.first, piece.last, norm.training, relu, d, zc, base(scratch, plane),
                  scratch + plane * row, with);
  }
  void store(int64_t p, const Piece& piece, const float* changed) const {
    if (mean) {
      store_means(changed, row, pixels(piece) / pooled, pooled, O, to(p, piece));
    } else {
      store_transposed(changed, row, pixels(piece), O, to(p, piece));
    }
  }
};

}  // namespace

DZ_KERNEL(channel_conv2d_batch_norm,
          (const float* delta,                                          // [P, N, H, W]
           const int64_t* channel,                                      // [P] input channel
           const float* weight,                                         // [O, C, kh, kw]
           const float* zc,                                             // [O, N, Ho, Wo]
           const double* var, const double* gamma, const double* beta,  // [O] each
           void* out,  // [P, N, Ho / pool, Wo / pool, O], with mean [P, N, O]; float32, or bfloat16 with half
           double eps, int64_t P, int64_t N, int64_t H, int64_t W, int64_t Ho, int64_t Wo, int64_t C, int64_t O,
           int64_t kh, int64_t kw, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h,
           int64_t dil_w, int64_t pool, bool training, bool relu, bool mean, bool half)) {
  const Window window = {H, W, Ho, Wo, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w};
  if (N * O * Ho * Wo == 0 || P == 0) return;
  // With `mean` a piece is whole images. The last register of an image may read up to kLanes floats past it.
  const int64_t image = Ho / pool * pool * Wo, columns = Wo / pool;
  const Strips strips(N, Ho, Wo, pool, mean ? max_of(1, kBlock / image) * image : kBlock);
  const int64_t widest = max_of(Strips(N, Ho, Wo, 1, kBlock).widest, strips.widest) + (mean ? kLanes : 0);
  const int64_t row = ceil_div(widest, kPanelRegisters * kLanes) * kPanelRegisters * kLanes;
  const BatchNorm norm = {zc, var, gamma, eps, P, N * Ho * Wo, training};
  const Channel producer(window, delta, channel, weight, P, N, C, O, kh, kw, row);
  const auto run = [&](const auto& to) { Normed(norm, producer, to).run(); };
  if (half) {
    run(ChannelsLast<Bf16>{norm, beta, strips, N, O, row, columns, Ho / pool * columns, relu, mean,
                           static_cast<Bf16*>(out)});
  } else {
    run(ChannelsLast<float>{norm, beta, strips, N, O, row, columns, Ho / pool * columns, relu, mean,
                            static_cast<float*>(out)});
  }
}

}  // namespace dz
