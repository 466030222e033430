// Vector exponentials, partial loads and stores, and reductions.
#pragma once

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dz {
namespace {

typedef int32_t Mask __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef int64_t Lanes8 __attribute__((vector_size(64)));

#if defined(__AVX512F__)
constexpr Mask kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
constexpr Mask kLane = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr Mask kLane = {0, 1, 2, 3};
#endif

constexpr int64_t kLaneTerms = 8;  // float32 terms that a lane sums before the total is widened to float64
constexpr int64_t kRowBatch = 8;   // rows processed together, to overlap the latency of divisions, roots and logarithms

#if defined(__AVX512F__)
// The first n lanes from memory, the others 0; 0 <= n <= kLanes.
DZ_INLINE Vec load_partial(const float* p, int64_t n) {
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
}

DZ_INLINE void store_partial(float* p, Vec v, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
}

// Lanes first .. last - 1 from memory, the others 0.
DZ_INLINE Vec load_between(const float* p, int64_t first, int64_t last) {
  const auto mask = static_cast<__mmask16>(((1u << last) - 1) & ~((1u << first) - 1));
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(mask, p));
}

DZ_INLINE Vec load_partial(const Bf16* p, int64_t n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  return load_vec(reinterpret_cast<const Bf16*>(&bits));
}
#elif defined(__AVX2__)
DZ_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

DZ_INLINE Vec load_partial(const float* p, int64_t n) {
  return reinterpret_cast<Vec>(_mm256_maskload_ps(p, first_lanes(n)));
}

DZ_INLINE Vec load_between(const float* p, int64_t first, int64_t last) {
  return reinterpret_cast<Vec>(_mm256_maskload_ps(p, _mm256_andnot_si256(first_lanes(first), first_lanes(last))));
}

DZ_INLINE void store_partial(float* p, Vec v, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes(n), reinterpret_cast<__m256>(v));
}
#else
DZ_INLINE Vec load_partial(const float* p, int64_t n) {
  if (n == kLanes) return load<Vec>(p);
  Vec v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

DZ_INLINE Vec load_between(const float* p, int64_t first, int64_t last) {
  Vec v = {};
  for (int64_t i = first; i < last; ++i) v[i] = p[i];
  return v;
}

DZ_INLINE void store_partial(float* p, Vec v, int64_t n) {
  if (n == kLanes) return store(p, v);
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
#endif

#if !defined(__AVX512F__)
DZ_INLINE Vec load_partial(const Bf16* p, int64_t n) {
  if (n == kLanes) return load_vec(p);
  Bf16 values[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = p[i];
  return load_vec(values);
}
#endif

// Stores the first `count` lanes, 0 <= count < kLanes.
DZ_INLINE void store_first(float* to, Vec v, int64_t count) { store_partial(to, v, count); }

DZ_INLINE void store_first(Bf16* to, Vec v, int64_t count) {
  Bf16 values[kLanes];
  store_vec(values, v);
  const Bf16* from = values;
#pragma GCC unroll 4
  for (int64_t size = kLanes / 2; size > 0; size /= 2) {  // in powers of two: the size of each copy is a constant
    if ((count & size) != 0) {
      __builtin_memcpy(to, from, static_cast<size_t>(size) * sizeof(Bf16));
      to += size;
      from += size;
    }
  }
}

// Calls do_all(delta, out) with typed pointers: Bf16 where `half` or `out_half` is set, else float.
template <typename F>
DZ_INLINE void with_types(const void* delta, bool half, void* out, bool out_half, F do_all) {
  const auto run = [&](const auto* from) {
    if (out_half) {
      do_all(from, static_cast<Bf16*>(out));
    } else {
      do_all(from, static_cast<float*>(out));
    }
  };
  if (half) {
    run(static_cast<const Bf16*>(delta));
  } else {
    run(static_cast<const float*>(delta));
  }
}

DZ_INLINE Vec absolute(Vec v) { return reinterpret_cast<Vec>(reinterpret_cast<Mask>(v) & 0x7fffffff); }

#if defined(__AVX512F__)
DZ_INLINE bool any(Mask m) {
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(m), reinterpret_cast<__m512i>(m)) != 0;
}
#elif defined(__AVX2__)
DZ_INLINE bool any(Mask m) { return _mm256_movemask_ps(reinterpret_cast<__m256>(m)) != 0; }
#else
DZ_INLINE bool any(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
#endif

// max and min that return v where v is NaN.
DZ_INLINE Vec at_least(Vec v, Vec bound) { return v < bound ? bound : v; }
DZ_INLINE Vec at_most(Vec v, Vec bound) { return v > bound ? bound : v; }

DZ_INLINE Double8 widen_low(Vec v) {
  Float8 part = {};
  __builtin_memcpy(&part, &v, kLanes < 8 ? sizeof(v) : sizeof(part));
  return widen(part);
}

// v in float64, folded to eight lanes.
DZ_INLINE Double8 widen_sum(Vec v) {
#if defined(__AVX512F__)
  Float8 high;
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(high), sizeof(high));
  return widen_low(v) + widen(high);
#else
  return widen_low(v);
#endif
}

// The sum of the lanes, in the order of totals_of.
DZ_INLINE double total_of(Double8 v) {
  typedef double Double4 __attribute__((vector_size(32)));
  typedef double Double2 __attribute__((vector_size(16)));
  Double4 half[2];
  __builtin_memcpy(half, &v, sizeof(v));
  const Double4 four = half[0] + half[1];
  Double2 quarter[2];
  __builtin_memcpy(quarter, &four, sizeof(four));
  const Double2 two = quarter[0] + quarter[1];
  return two[0] + two[1];
}

// Lane i is the sum of the lanes of v[i]. Halves of the register are added to each other until one lane is left.
DZ_INLINE Double8 totals_of(const Double8 (&v)[8]) {
  Double8 four[4], two[2];  // rows i and i + 4; then i, i + 2, i + 4, i + 6
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    four[i] = __builtin_shuffle(v[i], v[i + 4], Lanes8{0, 1, 2, 3, 8, 9, 10, 11}) +
              __builtin_shuffle(v[i], v[i + 4], Lanes8{4, 5, 6, 7, 12, 13, 14, 15});
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    two[i] = __builtin_shuffle(four[i], four[i + 2], Lanes8{0, 1, 8, 9, 4, 5, 12, 13}) +
             __builtin_shuffle(four[i], four[i + 2], Lanes8{2, 3, 10, 11, 6, 7, 14, 15});
  }
  return __builtin_shuffle(two[0], two[1], Lanes8{0, 8, 2, 10, 4, 12, 6, 14}) +
         __builtin_shuffle(two[0], two[1], Lanes8{1, 9, 3, 11, 5, 13, 7, 15});
}

// Returns r with x = k ln 2 + r and |r| <= 0.347, and scale = 2^k; for -87 <= x <= 88 or NaN.
DZ_INLINE Vec reduce(Vec x, Vec& scale) {
  constexpr float log2e = 1.44269504f, ln2_high = 0x1.62ep-1f, ln2_low = 0x1.0bfbe8p-15f;
  constexpr float shifter = 0x1.8p23f;  // adding it rounds to an integer, which then sits in the low bits
  const Vec rounded = x * log2e + shifter;
  const Vec k = rounded - shifter;
  scale = reinterpret_cast<Vec>((reinterpret_cast<Mask>(rounded) + 127) << 23);
  return (x - k * ln2_high) - k * ln2_low;
}

// exp(r) - 1 for |r| <= 0.347. The first omitted Taylor term, r^8 / 8!, is below 2e-8 of the result.
DZ_INLINE Vec expm1_near(Vec r) {
  Vec q = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  q = q * r + 1.0f / 120.0f;
  q = q * r + 1.0f / 24.0f;
  q = q * r + 1.0f / 6.0f;
  q = q * r + 0.5f;
  return r + r * r * q;
}

// exp(x) - 1 with a relative error below 4 u. x is clamped to -87 .. 88; NaN stays NaN.
DZ_INLINE Vec expm1_vec(Vec x) {
  Vec scale;
  const Vec near = expm1_near(reduce(at_most(at_least(x, Vec{} - 87.0f), Vec{} + 88.0f), scale));
  return near * scale + (scale - 1.0f);
}

// exp(x), with the same error and the same clamping.
DZ_INLINE Vec exp_vec(Vec x) {
  Vec scale;
  const Vec near = expm1_near(reduce(at_most(at_least(x, Vec{} - 87.0f), Vec{} + 88.0f), scale));
  return near * scale + scale;
}

// exp(x) with an error of about 2 ulps. x is clamped to -708 .. 708; NaN stays NaN.
DZ_INLINE Double8 exp_8(Double8 x) {
  constexpr double log2e = 1.4426950408889634, ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  constexpr double shifter = 0x1.8p52;
  x = x < -708.0 ? Double8{} - 708.0 : x;
  x = x > 708.0 ? Double8{} + 708.0 : x;
  const Double8 rounded = x * log2e + shifter;
  const Double8 k = rounded - shifter;
  const Double8 r = (x - k * ln2_high) - k * ln2_low;
  Double8 q = Double8{} + 1.0 / 6227020800.0;
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
  Bits8 bits;
  __builtin_memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits + 1023) << 52;  // 2^k
  Double8 scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return (r + r * r * q) * scale + scale;
}

}  // namespace
}  // namespace dz
