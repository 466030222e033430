#include "epilogue.h"
#include "normed.h"
#include "taps.h"

namespace dz {
namespace {

constexpr int64_t kBlock = 2048;  // pixels per block: x, zc and d of a block stay in cache for all perturbations

// Producer for one perturbed weight: the change of the convolution's output is the step times what the tap reads.
struct Tap {
  static constexpr bool kFloatSums = false;

  const Window& window;
  const float* x;        // [Cin, N, H, W]
  const int64_t* coord;  // [P, 4]
  const float* step;     // [P]
  int64_t N, in_per_group, out_per_group;
  Strips blocks;
  int64_t row;

  static constexpr int64_t planes = 1;
  int64_t floats() const { return row; }
  int64_t channel(int64_t p, int64_t) const { return coord[4 * p]; }

  const float* read(int64_t p) const {
    return x + (coord[4 * p] / out_per_group * in_per_group + coord[4 * p + 1]) * N * window.H * window.W;
  }
  int64_t top(int64_t p) const { return coord[4 * p + 2] * window.dil_h - window.pad_h; }
  int64_t left(int64_t p) const { return coord[4 * p + 3] * window.dil_w - window.pad_w; }

  const float* produce(int64_t p, int64_t first, int64_t last, float* d) const {
    const int64_t Wo = window.Wo;
    by_image(window, first / Wo, last / Wo, [&](int64_t n, int64_t u, int64_t rows, int64_t at) {
      tap_columns(window, read(p) + n * window.H * window.W, u * window.stride_h + top(p), window.stride_h, rows,
                  left(p), step[p], d + at * Wo);
    });
    return d;
  }

  // The mean of d over 16 pixels.
  void shift(int64_t p, float* to) const {
    const int64_t M = N * window.Ho * window.Wo, count = min_of(M, 16);
    double sum = 0.0;
    for (int64_t k = 0; k < count; ++k) {
      sum += tap_value(window, read(p), M * k / count, top(p), left(p));
    }
    *to = static_cast<float>(step[p] * sum / static_cast<double>(count));
  }
};

// Epilogue that writes planes, out [P, N, Ho / pool, Wo / pool].
struct Planes {
  const BatchNorm& norm;
  const double* beta;  // [C]
  Strips strips;
  bool relu;
  float* out;

  int64_t floats() const { return base_floats(strips); }
  void prepare(const Piece& piece, int64_t, int64_t channel, float* base) const {
    make_base(strips, piece.first, piece.last, norm.base(channel, piece.begin),
              affine(norm.before(channel), norm.gamma[channel], beta[channel]), base);
  }
  void prefetch(int64_t, const Piece&) const {}
  void change(int64_t p, const Piece& piece, int64_t, const float* d, const float* zc, const Coefficients<float>& with,
              const float* base) const {
    change_strips(strips, piece.first, piece.last, norm.training, relu, d, zc, base,
                  out + (p * strips.count + piece.first) * (strips.line / strips.pool), with);
  }
  void store(int64_t, const Piece&, const float*) const {}
};

}  // namespace

DZ_KERNEL(conv2d_tap_batch_norm,
          (const float* x,                                              // [Cin, N, H, W]
           const int64_t* coord, const float* step,                     // [P, 4] as (o, c, i, j), [P]
           const float* zc,                                             // [O, N, Ho, Wo]
           const double* var, const double* gamma, const double* beta,  // [O] each
           float* out,                                                  // [P, N, Ho / pool, Wo / pool]
           double eps, int64_t P, int64_t N, int64_t H, int64_t W, int64_t Ho, int64_t Wo, int64_t stride_h,
           int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w, int64_t in_per_group,
           int64_t out_per_group, int64_t pool, bool training, bool relu)) {
  const Window window = {H, W, Ho, Wo, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w};
  const int64_t M = N * Ho * Wo;
  if (M == 0 || P == 0) return;
  const BatchNorm norm = {zc, var, gamma, eps, P, M, training};
  const Planes to = {norm, beta, Strips(N, Ho, Wo, pool, kBlock), relu, out};
  const Strips blocks(N, Ho, Wo, 1, kBlock);
  const Tap tap = {
      window, x, coord, step, N, in_per_group, out_per_group, blocks, max_of(blocks.widest, to.strips.widest)};
  Normed(norm, tap, to).run();
}

}  // namespace dz
