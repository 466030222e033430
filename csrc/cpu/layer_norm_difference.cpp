#include "elementary.h"

namespace dz {
namespace {

constexpr int64_t kRun = 8;       // float32 terms that a lane adds before the sum goes on in float64
constexpr int64_t kTile = 8192;   // elements of zc that stay in cache over the perturbations
constexpr int64_t kTogether = 8;  // rows whose roots and divisions overlap

// v where the lane is below n, else 0.
DZ_INLINE Vec first(Vec v, int64_t n) {
  Mask lane;
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = static_cast<int32_t>(i);
  return lane < static_cast<int32_t>(n) ? v : Vec{};
}

double sum_of(const float* d, int64_t M) {
  Double8 total = {};
  for (int64_t i = 0; i < M;) {
    Vec part = {};
    const int64_t end = lesser(M, i + kRun * kLanes);
    for (; i + kLanes <= end; i += kLanes) part += load<Vec>(d + i);
    if (i < end) {
      part += load_some(d + i, end - i);
      i = end;
    }
    total += widen_sum(part);
  }
  return total_of(total);
}

struct Moments {
  double e, moved, change;  // sums of e, (zc + e)^2 and e (2 zc + e), e = d - shift
};

struct Parts {
  Vec e = {}, moved = {}, change = {};
  DZ_INLINE void add(Vec e_, Vec z) {
    const Vec w = z + e_;
    e += e_;
    moved += w * w;
    change += e_ * (z + w);
  }
};

Moments moments(const float* d, const float* zc, float shift, int64_t M) {
  Double8 e = {}, moved = {}, change = {};
  for (int64_t i = 0; i < M;) {
    Parts part;
    const int64_t end = lesser(M, i + kRun * kLanes);
    for (; i + kLanes <= end; i += kLanes) part.add(load<Vec>(d + i) - shift, load<Vec>(zc + i));
    if (i < end) {
      part.add(first(load_some(d + i, end - i) - shift, end - i), load_some(zc + i, end - i));
      i = end;
    }
    e += widen_sum(part.e);
    moved += widen_sum(part.moved);
    change += widen_sum(part.change);
  }
  return {total_of(e), total_of(moved), total_of(change)};
}

// out = gamma (a (d - shift - rest) - b zc)
template <bool kGamma, typename Out>
void normalise(const float* d, const float* zc, const float* gamma, Out* out, float shift, float rest, float a, float b,
               int64_t M) {
  int64_t i = 0;
  for (; i + kLanes <= M; i += kLanes) {
    const Vec y = a * ((load<Vec>(d + i) - shift) - rest) - b * load<Vec>(zc + i);
    store_vec(out + i, kGamma ? load<Vec>(gamma + i) * y : y);
  }
  if (i < M) {
    const int64_t n = M - i;
    const Vec y = a * ((load_some(d + i, n) - shift) - rest) - b * load_some(zc + i, n);
    store_first(out + i, kGamma ? load_some(gamma + i, n) * y : y, n);
  }
}

const float* as_floats(const float* from, float*, int64_t) { return from; }

const float* as_floats(const Bf16* from, float* to, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load_vec(from + i));
  if (i < size) store_some(to + i, load_some(from + i, size - i), size - i);
  return to;
}

// The mean is taken in two rounds, sum(d) and then the sum of what is left of d, so that a constant d gives 0. The new
// variance is always the mean of (zc + dzc)^2, which cannot cancel as var + dvar would.
template <typename In, typename Out>
void all(const In* delta, const float* zc, const double* var, const float* gamma, Out* out, double eps, int64_t P,
         int64_t R, int64_t M, bool centre) {
  const double size = static_cast<double>(M);
  const int64_t rows = greater(1, lesser(R, kTile / M)), tiles = ceil_div(R, rows);
  const int64_t together = greater(1, lesser(kTogether, kTile / 4 / M));  // they stay in L1
  // Bfloat16 rows in float32, as they are read three times.
  const int64_t held = sizeof(In) == sizeof(float) ? 0 : ceil_div(together * M, 16) * 16;
  Scratch<float> wide(omp_get_max_threads() * held);
#pragma omp parallel for schedule(static)
  for (int64_t piece = 0; piece < tiles * P; ++piece) {
    const int64_t start = piece / P * rows, p = piece % P;
    const int64_t stop = lesser(R, start + rows);
    for (int64_t r = start; r < stop; r += together) {
      const int64_t count = lesser(together, stop - r);
      const float* d = as_floats(delta + (p * R + r) * M, wide.data + omp_get_thread_num() * held, count * M);
      const float* z = zc + r * M;
      Out* to = out + (p * R + r) * M;
      float shift[kTogether] = {}, rest[kTogether], a[kTogether], b[kTogether];
      if (centre) {
        for (int64_t i = 0; i < count; ++i) shift[i] = static_cast<float>(sum_of(d + i * M, M) / size);
      }
      for (int64_t i = 0; i < count; ++i) {
        const Moments total = moments(d + i * M, z + i * M, shift[i], M);
        const double left = centre ? total.e / size : 0.0;
        const double moved = total.moved / size - left * left, dvar = total.change / size - left * left;
        const double s = __builtin_sqrt(var[r + i] + eps), t = __builtin_sqrt((moved < 0.0 ? 0.0 : moved) + eps);
        rest[i] = static_cast<float>(left);
        a[i] = static_cast<float>(1.0 / t);
        b[i] = static_cast<float>(dvar / (s * t * (s + t)));
      }
      for (int64_t i = 0; i < count; ++i) {
        if (gamma != nullptr) {
          normalise<true>(d + i * M, z + i * M, gamma, to + i * M, shift[i], rest[i], a[i], b[i], M);
        } else {
          normalise<false>(d + i * M, z + i * M, nullptr, to + i * M, shift[i], rest[i], a[i], b[i], M);
        }
      }
    }
  }
}

}  // namespace

void DZ_KERNEL(layer_norm_difference)(const void* delta, const float* zc, const double* var, const float* gamma,
                                      void* out, double eps, int64_t P, int64_t R, int64_t M, bool centre, bool half,
                                      bool out_half) {
  if (M == 0) return;
  with_types(delta, half, out, out_half,
             [&](const auto* from, auto* to) { all(from, zc, var, gamma, to, eps, P, R, M, centre); });
}

}  // namespace dz
