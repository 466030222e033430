#include <cmath>

#include "common.h"

namespace dz {
namespace {

constexpr double kLargest = 700.0;  // exp of more would be close to infinity

// exp(x) - 1 to about two units in the last place for -708 <= x <= 700; smaller x count as -708, NaN stays NaN.
DZ_INLINE Double8 expm1_8(Double8 x) {
  constexpr double log2e = 1.4426950408889634, ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  constexpr double shifter = 0x1.8p52;  // adding it rounds to an integer, which then sits in the low bits
  x = x < -708.0 ? Double8{} - 708.0 : x;
  const Double8 rounded = x * log2e + shifter;
  const Double8 k = rounded - shifter;
  const Double8 r = (x - k * ln2_high) - k * ln2_low;
  // Taylor series of (exp(r) - 1 - r) / r^2; |r| <= 0.347, so the first term left out is below 1e-18 of the sum.
  Double8 q = Double8{} + 1.0 / 1307674368000.0;
  q = q * r + 1.0 / 87178291200.0;
  q = q * r + 1.0 / 6227020800.0;
  q = q * r + 1.0 / 479001600.0;
  q = q * r + 1.0 / 39916800.0;
  q = q * r + 1.0 / 3628800.0;
  q = q * r + 1.0 / 362880.0;
  q = q * r + 1.0 / 40320.0;
  q = q * r + 1.0 / 5040.0;
  q = q * r + 1.0 / 720.0;
  q = q * r + 1.0 / 120.0;
  q = q * r + 1.0 / 24.0;
  q = q * r + 1.0 / 6.0;
  q = q * r + 0.5;
  const Double8 small = r + r * r * q;
  Bits8 bits;
  __builtin_memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits + 1023) << 52;  // 2^k
  Double8 scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return small * scale + (scale - 1.0);
}

// log(sum_k p_k exp(e_k)) from log p_k, where the sum may be far from 1.
double far_change(const double* log_p, const double* e, int64_t K) {
  double top = -HUGE_VAL;
  for (int64_t k = 0; k < K; ++k) top = top < log_p[k] + e[k] ? log_p[k] + e[k] : top;
  double total = 0.0;
  for (int64_t k = 0; k < K; ++k) total += exp(log_p[k] + e[k] - top);
  return top + log(total);
}

}  // namespace

// log(sum_k p_k exp(d_k)) - d_y does not change when a constant is added to all d_k, so it equals
// log1p(sum_k p_k expm1(e_k)) with e_k = d_k - d_y: no difference of two large numbers is left.
void DZ_KERNEL(cross_entropy_difference)(const double* log_probs, const double* probs, const int64_t* target,
                                         const float* dlogits, double* out, int64_t P, int64_t N, int64_t K) {
  const int64_t rows =
      greater(1, lesser(N, 1024 / K));  // samples handled at once, so that they fill registers and stay in L1
  const int64_t size = ceil_div(rows * K, 8) * 8;
  Scratch<double> scratch(omp_get_max_threads() * 2 * size);

#pragma omp parallel
  {
    double* e = scratch.data + omp_get_thread_num() * 2 * size;
    double* change = e + size;  // expm1(e)
    for (int64_t i = 0; i < size; ++i) e[i] = 0.0;

#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; ++p) {
      double total = 0.0;
      for (int64_t first = 0; first < N; first += rows) {
        const int64_t count = lesser(rows, N - first);
        for (int64_t n = 0; n < count; ++n) {
          const float* d = dlogits + (p * N + first + n) * K;
          const double at_target = d[target[first + n]];
          for (int64_t k = 0; k < K; ++k) e[n * K + k] = d[k] - at_target;
        }
        for (int64_t i = 0; i < count * K; i += 8) store(change + i, expm1_8(load<Double8>(e + i)));
        for (int64_t n = 0; n < count; ++n) {
          const double* prob = probs + (first + n) * K;
          double top = 0.0, moved = 0.0;
          for (int64_t k = 0; k < K; ++k) {
            top = top < e[n * K + k] ? e[n * K + k] : top;
            moved += prob[k] * change[n * K + k];
          }
          if (top <= kLargest && moved > -0.5) {
            total += log1p(moved);
          } else {
            total += far_change(log_probs + (first + n) * K, e + n * K, K);
          }
        }
      }
      out[p] = total / static_cast<double>(N);
    }
  }
}

}  // namespace dz
