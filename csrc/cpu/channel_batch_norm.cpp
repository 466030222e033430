#include "common.h"

namespace dz {
namespace {

// Sums are taken over blocks of this many elements and the blocks added in order: the result does not depend on which
// thread took which block.
constexpr int64_t kBlock = 4096;

// to[m] = from[n, h, w] - shift over one channel, m = (n * H + h) * W + w in first .. last - 1, subtracted in float64.
void gather(const float* from, int64_t sn, int64_t sh, int64_t sw, int64_t H, int64_t W, double shift, float* to,
            int64_t first, int64_t last) {
  for (int64_t m = first; m < last;) {
    const int64_t w = m % W, h = m / W % H, n = m / W / H;
    const int64_t run = lesser(W - w, last - m);
    const float* row = from + n * sn + h * sh + w * sw;
    if (sw == 1) {
      for (int64_t i = 0; i < run; ++i) to[m + i] = static_cast<float>(row[i] - shift);
    } else {
      for (int64_t i = 0; i < run; ++i) to[m + i] = static_cast<float>(row[i * sw] - shift);
    }
    m += run;
  }
}

double sum_of(const float* d, int64_t size) {
  Double8 total = {};
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) total += widen(load<Float8>(d + i));
  double rest = 0.0;
  for (; i < size; ++i) rest += d[i];
  return sum(total) + rest;
}

// Sum of 2 zc dzc + dzc^2.
double variance_change(const float* zc, const float* d, double mean_d, int64_t size) {
  Double8 total = {};
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const Double8 dzc = widen(load<Float8>(d + i)) - mean_d, z = widen(load<Float8>(zc + i));
    total += dzc * (z + z + dzc);
  }
  double rest = 0.0;
  for (; i < size; ++i) {
    const double dzc = d[i] - mean_d, z = zc[i];
    rest += dzc * (z + z + dzc);
  }
  return sum(total) + rest;
}

// Sum of (zc + dzc)^2.
double moved_variance(const float* zc, const float* d, double mean_d, int64_t size) {
  double total = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    const double moved = zc[i] + (d[i] - mean_d);
    total += moved * moved;
  }
  return total;
}

// max(y + dy, 0) - max(y, 0) without subtracting the two. NaN stays NaN.
DZ_INLINE float relu_change(float y, float dy) {
  const float alive = dy < -y ? -y : dy;
  const float dead = y + dy < 0.0f ? 0.0f : y + dy;
  return y > 0.0f ? alive : dead;
}

// out = a dzc - b zc, then the change of the activation if there is one.
void normalise(const float* zc, const float* y, const float* d, float* out, double mean_d, double a, double b,
               int64_t size) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const Double8 dzc = widen(load<Float8>(d + i)) - mean_d, z = widen(load<Float8>(zc + i));
    store(out + i, __builtin_convertvector(a * dzc - b * z, Float8));
  }
  for (; i < size; ++i) out[i] = static_cast<float>(a * (d[i] - mean_d) - b * zc[i]);
  if (y != nullptr) {
    for (i = 0; i < size; ++i) out[i] = relu_change(y[i], out[i]);
  }
}

}  // namespace

void DZ_KERNEL(channel_batch_norm)(const float* delta, const int64_t* channel, const float* x, const double* mean,
                                   const double* var, const double* gamma, const float* y, float* out, double eps,
                                   int64_t P, int64_t N, int64_t H, int64_t W, int64_t xn, int64_t xc, int64_t xh,
                                   int64_t xw, int64_t yn, int64_t yc, int64_t yh, int64_t yw) {
  const int64_t M = N * H * W, blocks = ceil_div(M, kBlock);
  if (M == 0) return;
  const int64_t threads = omp_get_max_threads();
  // Whole perturbations per thread keep a plane in cache over the three passes; too few of them are split by blocks.
  // Both ways add the same blocks in the same order.
  const bool split = P < threads;
  const int64_t slots = split ? 1 : threads;
  const int64_t size = ceil_div(M, 16) * 16;
  Scratch<float> planes(slots * size * (y != nullptr ? 2 : 1));
  Scratch<double> partials(slots * (blocks + 8));

#pragma omp parallel if (!split)
  {
    const int64_t slot = split ? 0 : omp_get_thread_num();
    float* zc = planes.data + slot * size;
    float* yc_plane = y != nullptr ? planes.data + (slots + slot) * size : nullptr;
    double* partial = partials.data + slot * (blocks + 8);
    int64_t held = -1;  // the channel in zc

#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; ++p) {
      const int64_t c = channel[p];
      const float* d = delta + p * M;

#pragma omp parallel for schedule(static) if (split)
      for (int64_t k = 0; k < blocks; ++k) {
        const int64_t first = k * kBlock, last = lesser(M, first + kBlock);
        if (held != c) {
          gather(x + c * xc, xn, xh, xw, H, W, mean[c], zc, first, last);
          if (yc_plane != nullptr) gather(y + c * yc, yn, yh, yw, H, W, 0.0, yc_plane, first, last);
        }
        partial[k] = sum_of(d + first, last - first);
      }
      held = c;
      double mean_d = 0.0;
      for (int64_t k = 0; k < blocks; ++k) mean_d += partial[k];
      mean_d /= static_cast<double>(M);

#pragma omp parallel for schedule(static) if (split)
      for (int64_t k = 0; k < blocks; ++k) {
        const int64_t first = k * kBlock;
        partial[k] = variance_change(zc + first, d + first, mean_d, lesser(M - first, kBlock));
      }
      double dvar = 0.0;
      for (int64_t k = 0; k < blocks; ++k) dvar += partial[k];
      dvar /= static_cast<double>(M);

      const double before = var[c] + eps;
      double after = before + dvar;
      if (after < before / 16) {  // four bits are gone: take the new variance from the moved values themselves
        after = 0.0;
        for (int64_t k = 0; k < blocks; ++k) {
          const int64_t first = k * kBlock;
          after += moved_variance(zc + first, d + first, mean_d, lesser(M - first, kBlock));
        }
        after = after / static_cast<double>(M) + eps;
      }
      const double s = __builtin_sqrt(before), t = __builtin_sqrt(after);
      const double a = gamma[c] / t, b = gamma[c] * dvar / (s * t * (s + t));

#pragma omp parallel for schedule(static) if (split)
      for (int64_t k = 0; k < blocks; ++k) {
        const int64_t first = k * kBlock;
        normalise(zc + first, yc_plane != nullptr ? yc_plane + first : nullptr, d + first, out + p * M + first, mean_d,
                  a, b, lesser(M - first, kBlock));
      }
    }
  }
}

}  // namespace dz
