#include "plane_norm.h"
#include "taps.h"

namespace dz {
namespace {

constexpr int64_t kBlock = 2048;  // pixels at a time: of x, zc and what is made of them, in cache for all perturbations

// What the weights that move read.
struct Read {
  const Window& window;
  const float* x;        // [Cin, N, H, W]
  const int64_t* coord;  // [P, 4]
  const float* step;     // [P]
  int64_t N, in_per_group, out_per_group;

  int64_t out(int64_t p) const { return coord[4 * p]; }
  const float* channel(int64_t p) const {
    return x + (out(p) / out_per_group * in_per_group + coord[4 * p + 1]) * N * window.H * window.W;
  }
  int64_t top(int64_t p) const { return coord[4 * p + 2] * window.dil_h - window.pad_h; }
  int64_t left(int64_t p) const { return coord[4 * p + 3] * window.dil_w - window.pad_w; }

  // The differences of pixels `first` to `last`, whole rows.
  void take(int64_t p, int64_t first, int64_t last, float* d) const {
    const int64_t Wo = window.Wo;
    by_image(window, first / Wo, last / Wo, [&](int64_t n, int64_t u, int64_t rows, int64_t at) {
      tap_columns(window, channel(p) + n * window.H * window.W, u * window.stride_h + top(p), window.stride_h, rows,
                  left(p), step[p], d + at * Wo);
    });
  }

  // The mean of 16 pixels: near enough to the mean of all, so that sums about it do not cancel.
  float shift(int64_t p) const {
    const int64_t M = N * window.Ho * window.Wo, seen = lesser(M, 16);
    double some = 0.0;
    for (int64_t k = 0; k < seen; ++k) {
      some += tap_value(window, channel(p), M * k / seen, top(p), left(p));
    }
    return static_cast<float>(step[p] * some / static_cast<double>(seen));
  }
};

}  // namespace

void DZ_KERNEL(conv2d_tap_batch_norm)(const float* x, const int64_t* coord, const float* step, const float* zc,
                                      const double* var, const double* gamma, const double* beta, float* out,
                                      double eps, int64_t P, int64_t N, int64_t H, int64_t W, int64_t Ho, int64_t Wo,
                                      int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h,
                                      int64_t dil_w, int64_t in_per_group, int64_t out_per_group, int64_t pool,
                                      bool training, bool relu) {
  const Window window = {H, W, Ho, Wo, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w};
  const Read read = {window, x, coord, step, N, in_per_group, out_per_group};
  const int64_t M = N * Ho * Wo, columns = Wo / pool;
  if (M == 0 || P == 0) return;
  const Strips blocks(N, Ho, Wo, 1, kBlock), strips(N, Ho, Wo, pool, kBlock);
  const int64_t held = ceil_div(greater(blocks.widest, strips.widest), 16) * 16, each = held + base_floats(strips);
  Scratch<float> scratch(omp_get_max_threads() * each), shifts(P);
  Scratch<Moments> sums(training ? P * blocks.pieces : 0);
  Scratch<Coefficients> coefficients(P);

#pragma omp parallel
  {
    float *const d = scratch.data + omp_get_thread_num() * each, *const made = d + held;
    // Blocks outside, perturbations inside: x and zc of a block stay in cache for all of them.
    if (training) {
#pragma omp for schedule(static)
      for (int64_t p = 0; p < P; ++p) shifts.data[p] = read.shift(p);
#pragma omp for schedule(static)
      for (int64_t k = 0; k < blocks.pieces; ++k) {
        const int64_t first = blocks.begin(k), last = blocks.end(k);
        for (int64_t p = 0; p < P; ++p) {
          read.take(p, first, last, d);
          sums.data[p * blocks.pieces + k] = moments(d, zc + read.out(p) * M + first, shifts.data[p], last - first);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; ++p) {
      const int64_t o = read.out(p);
      const double before = var[o] + eps;
      if (!training) {
        coefficients.data[p] = still_coefficients(before, gamma[o]);
        continue;
      }
      Moments all = {};
      for (int64_t k = 0; k < blocks.pieces; ++k) all += sums.data[p * blocks.pieces + k];
      coefficients.data[p] = moved_coefficients(all, shifts.data[p], M, before, gamma[o], [&](double mean_d) {
        double after = 0.0;
        for (int64_t k = 0; k < blocks.pieces; ++k) {
          const int64_t first = blocks.begin(k), last = blocks.end(k);
          read.take(p, first, last, d);
          after += moved_variance(zc + o * M + first, d, mean_d, last - first);
        }
        return after / static_cast<double>(M) + eps;
      });
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < strips.pieces; ++k) {
      const int64_t first = strips.begin(k), top = strips.first(k), bottom = strips.last(k);
      for (int64_t p = 0; p < P; ++p) {
        const int64_t o = read.out(p);
        const Base base = base_of(var[o] + eps, gamma[o], beta[o]);
        if (p == 0 || o != read.out(p - 1)) make_base(strips, top, bottom, zc + o * M + first, base, made);
        read.take(p, first, strips.end(k), d);
        change_strips(strips, top, bottom, training, relu, d, zc + o * M + first, made,
                      out + (p * strips.count + top) * columns, coefficients.data[p], base);
      }
    }
  }
}

}  // namespace dz
