// Change of the mean cross-entropy, from differences of the logits wherever they come from.
#pragma once

#include <cmath>

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dz {
namespace {

constexpr double kLargest = 700.0;                    // exp of more would be close to infinity
constexpr double kSmall = 0.0625, kTiny = 0.0078125;  // up to here short series do
constexpr int64_t kSide = kLanes / 2;                 // samples side by side: float64 lanes of a register

typedef double Side __attribute__((vector_size(kSide * sizeof(double))));
typedef float FloatSide __attribute__((vector_size(kSide * sizeof(float))));
typedef uint64_t SideBits __attribute__((vector_size(kSide * sizeof(uint64_t))));

DZ_INLINE Side widen_side(FloatSide v) { return __builtin_convertvector(v, Side); }

DZ_INLINE Side magnitude(Side v) { return reinterpret_cast<Side>(reinterpret_cast<SideBits>(v) & (~uint64_t{0} >> 1)); }

// Per lane the larger one; b if a is NaN.
DZ_INLINE Side largest(Side a, Side b) {
#if defined(__AVX512F__)
  // With a mask: GCC 12 warns inside the plain form.
  return reinterpret_cast<Side>(_mm512_maskz_max_pd(0xff, reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Side>(_mm256_max_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b)));
#else
  return a > b ? a : b;
#endif
}

// All lanes; NaN is not.
DZ_INLINE bool all_at_most(Side v, double bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(v), _mm512_set1_pd(bound), _CMP_LE_OQ) == 0xff;
#elif defined(__AVX2__)
  return _mm256_movemask_pd(_mm256_cmp_pd(reinterpret_cast<__m256d>(v), _mm256_set1_pd(bound), _CMP_LE_OQ)) == 0xf;
#else
  return v[0] <= bound && v[1] <= bound;
#endif
}

// exp(x) - 1 to about two units in the last place for -708 <= x <= 700; smaller x count as -708, NaN stays NaN.
DZ_INLINE Side expm1_any(Side x) {
  constexpr double log2e = 1.4426950408889634, ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  constexpr double shifter = 0x1.8p52;  // adding it rounds to an integer, which then sits in the low bits
  x = x < -708.0 ? Side{} - 708.0 : x;
  const Side rounded = x * log2e + shifter;
  const Side k = rounded - shifter;
  const Side r = (x - k * ln2_high) - k * ln2_low;
  // Taylor series of (exp(r) - 1 - r) / r^2; |r| <= 0.347, so the first term left out is below 1e-18 of the sum.
  Side q = Side{} + 1.0 / 1307674368000.0;
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
  const Side small = r + r * r * q;
  SideBits bits;
  __builtin_memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits + 1023) << 52;  // 2^k
  Side scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return small * scale + (scale - 1.0);
}

// exp(x) - 1 for |x| <= kSmall, or kTiny: the first term left out is below 5e-18, or 5e-17, of the sum.
template <bool TINY>
DZ_INLINE Side expm1_small(Side x) {
  Side q = Side{} + 1.0 / 720.0;
  if constexpr (!TINY) {
    q = Side{} + 1.0 / 362880.0;
    q = q * x + 1.0 / 40320.0;
    q = q * x + 1.0 / 5040.0;
    q = q * x + 1.0 / 720.0;
  }
  q = q * x + 1.0 / 120.0;
  q = q * x + 1.0 / 24.0;
  q = q * x + 1.0 / 6.0;
  q = q * x + 0.5;
  return x + x * x * q;
}

// sum_k p_k expm1(e_k) of samples side by side
template <bool TINY>
DZ_INLINE Side moved_small(const double* p, const double* e, int64_t K) {
  Side even = {}, odd = {};
  int64_t k = 0;
  for (; k + 2 <= K; k += 2, p += 2 * kSide, e += 2 * kSide) {
    even += load<Side>(p) * expm1_small<TINY>(load<Side>(e));
    odd += load<Side>(p + kSide) * expm1_small<TINY>(load<Side>(e + kSide));
  }
  if (k < K) even += load<Side>(p) * expm1_small<TINY>(load<Side>(e));
  return even + odd;
}

// log(1 + x) = 2 artanh(x / (2 + x)) for |x| <= 0.07: the first term left out is below 1e-18 of the sum.
DZ_INLINE Side log1p_small(Side x) {
  const Side s = x / (2.0 + x), t = s * s;
  Side q = Side{} + 1.0 / 13.0;
  q = q * t + 1.0 / 11.0;
  q = q * t + 1.0 / 9.0;
  q = q * t + 1.0 / 7.0;
  q = q * t + 1.0 / 5.0;
  q = q * t + 1.0 / 3.0;
  return 2.0 * (s + s * t * q);
}

// log(sum_k p_k exp(e_k)) from log p_k, where the sum may be far from 1. e is one of kSide columns.
double far_change(const double* log_p, const double* e, int64_t K) {
  double top = -HUGE_VAL;
  for (int64_t k = 0; k < K; ++k) top = top < log_p[k] + e[k * kSide] ? log_p[k] + e[k * kSide] : top;
  double total = 0.0;
  for (int64_t k = 0; k < K; ++k) total += exp(log_p[k] + e[k * kSide] - top);
  return top + log(total);
}

// log(sum_k p_k exp(d_k)) - d_y does not change when a constant is added to all d_k, so it equals
// log1p(sum_k p_k expm1(e_k)) with e_k = d_k - d_y: no difference of two large numbers is left.
// make(p) gives a function of (n, e) that writes e[K, kSide] for the samples n[0] .. n[kSide - 1].
template <typename Make>
void mean_change(const double* log_probs, const double* probs, double* out, int64_t P, int64_t N, int64_t K,
                 const Make& make) {
  const int64_t blocks = ceil_div(N, kSide);
  Scratch<double> beside(P > 0 ? blocks * K * kSide : 0), scratch(omp_get_max_threads() * K * kSide);
  if (P == 0) return;

#pragma omp parallel
  {
    double* e = scratch.data + omp_get_thread_num() * K * kSide;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < kSide; ++i) {
        const double* row = probs + lesser(N - 1, b * kSide + i) * K;
        for (int64_t k = 0; k < K; ++k) beside.data[(b * K + k) * kSide + i] = row[k];
      }
    }
#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; ++p) {
      const auto differences = make(p);
      Side total = {};
      for (int64_t b = 0; b < blocks; ++b) {
        int64_t n[kSide];
        for (int64_t i = 0; i < kSide; ++i) n[i] = lesser(N - 1, b * kSide + i);
        differences(n, e);
        const double* prob = beside.data + b * K * kSide;
        Side widest = {};
        for (int64_t k = 0; k < K; ++k) widest = largest(magnitude(load<Side>(e + k * kSide)), widest);
        const bool small = all_at_most(widest, kSmall);
        Side moved = {};
        if (small) {
          moved = all_at_most(widest, kTiny) ? moved_small<true>(prob, e, K) : moved_small<false>(prob, e, K);
        } else {
          for (int64_t k = 0; k < K; ++k) moved += load<Side>(prob + k * kSide) * expm1_any(load<Side>(e + k * kSide));
        }
        Side change;
        if (small && all_at_most(magnitude(moved), kSmall + 0.003)) {
          change = log1p_small(moved);
        } else {
          for (int64_t i = 0; i < kSide; ++i) {
            double top = 0.0;
            for (int64_t k = 0; k < K; ++k) top = top < e[k * kSide + i] ? e[k * kSide + i] : top;
            change[i] =
                top <= kLargest && moved[i] > -0.5 ? log1p(moved[i]) : far_change(log_probs + n[i] * K, e + i, K);
          }
        }
        for (int64_t i = N - b * kSide; i < kSide; ++i) change[i] = 0.0;
        total += change;
      }
      double sum = 0.0;
      for (int64_t i = 0; i < kSide; ++i) sum += total[i];
      out[p] = sum / static_cast<double>(N);
    }
  }
}

}  // namespace
}  // namespace dz
