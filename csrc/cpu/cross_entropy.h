// Change of the mean cross-entropy for any source of logit differences. Vectors hold one value per sample.
#pragma once

#include <cmath>

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dz {
namespace {

constexpr double kMaxExponent = 700.0;                // exp of more would come close to overflow
constexpr double kSmall = 0.0625, kTiny = 0.0078125;  // |x| up to which shorter series suffice
constexpr int64_t kDoubles = kLanes / 2;              // samples per vector: float64 lanes of a register

typedef double Doubles __attribute__((vector_size(kDoubles * sizeof(double))));
typedef float Floats __attribute__((vector_size(kDoubles * sizeof(float))));
typedef uint64_t DoubleBits __attribute__((vector_size(kDoubles * sizeof(uint64_t))));

DZ_INLINE Doubles widen_floats(Floats v) { return __builtin_convertvector(v, Doubles); }

DZ_INLINE Doubles absolute(Doubles v) {
  return reinterpret_cast<Doubles>(reinterpret_cast<DoubleBits>(v) & (~uint64_t{0} >> 1));
}

// The maximum; b if a is NaN.
DZ_INLINE Doubles max_of_numbers(Doubles a, Doubles b) {
#if defined(__AVX512F__)
  // The masked form: the plain one triggers a warning inside GCC 12's header.
  return reinterpret_cast<Doubles>(
      _mm512_maskz_max_pd(0xff, reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Doubles>(_mm256_max_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b)));
#else
  return a > b ? a : b;
#endif
}

// Whether v <= bound in all lanes; false where one is NaN.
DZ_INLINE bool all_at_most(Doubles v, double bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(v), _mm512_set1_pd(bound), _CMP_LE_OQ) == 0xff;
#elif defined(__AVX2__)
  return _mm256_movemask_pd(_mm256_cmp_pd(reinterpret_cast<__m256d>(v), _mm256_set1_pd(bound), _CMP_LE_OQ)) == 0xf;
#else
  return v[0] <= bound && v[1] <= bound;
#endif
}

// exp(x) - 1 with an error of about 2 ulps for x <= 700. x is clamped to at least -708; NaN stays NaN.
DZ_INLINE Doubles expm1_doubles(Doubles x) {
  constexpr double log2e = 1.4426950408889634, ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  constexpr double shifter = 0x1.8p52;  // adding it rounds to an integer, in the low bits
  x = x < -708.0 ? Doubles{} - 708.0 : x;
  const Doubles rounded = x * log2e + shifter;
  const Doubles k = rounded - shifter;
  const Doubles r = (x - k * ln2_high) - k * ln2_low;
  // Taylor series of (exp(r) - 1 - r) / r^2; |r| <= 0.347, so the first omitted term is below 1e-18 of the sum.
  Doubles q = Doubles{} + 1.0 / 1307674368000.0;
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
  const Doubles small = r + r * r * q;
  DoubleBits bits;
  __builtin_memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits + 1023) << 52;  // 2^k
  Doubles scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return small * scale + (scale - 1.0);
}

// exp(x) - 1 for |x| <= kSmall (kTiny with TINY): the first omitted term is below 5e-18 (5e-17) of the sum.
template <bool TINY>
DZ_INLINE Doubles expm1_small(Doubles x) {
  Doubles q = Doubles{} + 1.0 / 720.0;
  if constexpr (!TINY) {
    q = Doubles{} + 1.0 / 362880.0;
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

// sum_k p_k expm1(e_k) per sample
template <bool TINY>
DZ_INLINE Doubles sum_small(const double* p, const double* e, int64_t K) {
  Doubles even = {}, odd = {};
  int64_t k = 0;
  for (; k + 2 <= K; k += 2, p += 2 * kDoubles, e += 2 * kDoubles) {
    even += load<Doubles>(p) * expm1_small<TINY>(load<Doubles>(e));
    odd += load<Doubles>(p + kDoubles) * expm1_small<TINY>(load<Doubles>(e + kDoubles));
  }
  if (k < K) even += load<Doubles>(p) * expm1_small<TINY>(load<Doubles>(e));
  return even + odd;
}

// log(1 + x) = 2 artanh(x / (2 + x)) for |x| <= 0.07: the first omitted term is below 1e-18 of the sum.
DZ_INLINE Doubles log1p_small(Doubles x) {
  const Doubles s = x / (2.0 + x), t = s * s;
  Doubles q = Doubles{} + 1.0 / 13.0;
  q = q * t + 1.0 / 11.0;
  q = q * t + 1.0 / 9.0;
  q = q * t + 1.0 / 7.0;
  q = q * t + 1.0 / 5.0;
  q = q * t + 1.0 / 3.0;
  return 2.0 * (s + s * t * q);
}

// log(sum_k p_k exp(e_k)) from log p_k, for a sum that may be far from 1. e is one column of [K, kDoubles].
double far_change(const double* log_p, const double* e, int64_t K) {
  double top = -HUGE_VAL;
  for (int64_t k = 0; k < K; ++k) top = top < log_p[k] + e[k * kDoubles] ? log_p[k] + e[k * kDoubles] : top;
  double total = 0.0;
  for (int64_t k = 0; k < K; ++k) total += exp(log_p[k] + e[k * kDoubles] - top);
  return top + log(total);
}

// The change of a sample's loss with class y is log(sum_k p_k exp(d_k)) - d_y. It does not change when a constant is
// added to all d_k, so it equals log1p(sum_k p_k expm1(e_k)) with e_k = d_k - d_y, which does not cancel.
//
// make(p) returns a function (n, e) that writes e[K, kDoubles] for the samples n[0] .. n[kDoubles - 1].
template <typename Make>
void mean_change(const double* log_probs, const double* probs, double* out, int64_t P, int64_t N, int64_t K,
                 const Make& make) {
  const int64_t blocks = ceil_div(N, kDoubles);
  Scratch<double> interleaved(P > 0 ? blocks * K * kDoubles : 0), scratch(omp_get_max_threads() * K * kDoubles);
  if (P == 0) return;

#pragma omp parallel
  {
    double* e = scratch.data + omp_get_thread_num() * K * kDoubles;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < kDoubles; ++i) {
        const double* row = probs + min_of(N - 1, b * kDoubles + i) * K;
        for (int64_t k = 0; k < K; ++k) interleaved.data[(b * K + k) * kDoubles + i] = row[k];
      }
    }
#pragma omp for schedule(static)
    for (int64_t p = 0; p < P; ++p) {
      const auto differences = make(p);
      Doubles total = {};
      for (int64_t b = 0; b < blocks; ++b) {
        int64_t n[kDoubles];
        for (int64_t i = 0; i < kDoubles; ++i) n[i] = min_of(N - 1, b * kDoubles + i);
        differences(n, e);
        const double* prob = interleaved.data + b * K * kDoubles;
        Doubles max_e = {};
        for (int64_t k = 0; k < K; ++k) max_e = max_of_numbers(absolute(load<Doubles>(e + k * kDoubles)), max_e);
        const bool small = all_at_most(max_e, kSmall);
        Doubles sum_expm1 = {};
        if (small) {
          sum_expm1 = all_at_most(max_e, kTiny) ? sum_small<true>(prob, e, K) : sum_small<false>(prob, e, K);
        } else {
          for (int64_t k = 0; k < K; ++k)
            sum_expm1 += load<Doubles>(prob + k * kDoubles) * expm1_doubles(load<Doubles>(e + k * kDoubles));
        }
        Doubles change;
        if (small && all_at_most(absolute(sum_expm1), kSmall + 0.003)) {
          change = log1p_small(sum_expm1);
        } else {
          for (int64_t i = 0; i < kDoubles; ++i) {
            double top = 0.0;
            for (int64_t k = 0; k < K; ++k) top = top < e[k * kDoubles + i] ? e[k * kDoubles + i] : top;
            change[i] = top <= kMaxExponent && sum_expm1[i] > -0.5 ? log1p(sum_expm1[i])
                                                                   : far_change(log_probs + n[i] * K, e + i, K);
          }
        }
        for (int64_t i = N - b * kDoubles; i < kDoubles; ++i) change[i] = 0.0;
        total += change;
      }
      double sum = 0.0;
      for (int64_t i = 0; i < kDoubles; ++i) sum += total[i];
      out[p] = sum / static_cast<double>(N);
    }
  }
}

}  // namespace
}  // namespace dz
