// Vector types, conversions and scratch memory for all kernels. Everything is in an unnamed namespace and no standard
// library template is instantiated: the linker could replace the copy that an older CPU runs by a weak symbol compiled
// for AVX-512.
#pragma once

#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "kernel.h"

#define DZ_INLINE inline __attribute__((always_inline))

namespace dz {
namespace {

// Float32 lanes of a vector register at this instruction set level.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

typedef uint16_t HalfBits __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint32_t FloatBits __attribute__((vector_size(kLanes * sizeof(uint32_t))));

// A bfloat16: the upper half of a float32.
struct Bf16 {
  uint16_t bits;
};

typedef float Float4 __attribute__((vector_size(16)));
// These have eight lanes at every level: all levels split a sum into the same eight partial sums.
typedef float Float8 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));
typedef uint64_t Bits8 __attribute__((vector_size(64)));

template <typename V, typename T>
DZ_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename T>
DZ_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

DZ_INLINE Vec load_vec(const float* p) { return load<Vec>(p); }

DZ_INLINE Vec load_vec(const Bf16* p) {
  const FloatBits bits = __builtin_convertvector(load<HalfBits>(p), FloatBits) << 16;
  return reinterpret_cast<Vec>(bits);
}

DZ_INLINE void store_vec(float* p, Vec v) { store(p, v); }

// Rounds to nearest, ties to even; NaN stays NaN.
DZ_INLINE void store_vec(Bf16* p, Vec v) {
  const FloatBits bits = reinterpret_cast<FloatBits>(v);
  const FloatBits rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const FloatBits upper = v == v ? rounded : (bits | 0x400000);
  store(p, __builtin_convertvector(upper >> 16, HalfBits));
}

DZ_INLINE void store_one(float* p, float v) { *p = v; }

DZ_INLINE void store_one(Bf16* p, float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  bits = v == v ? bits + 0x7fff + ((bits >> 16) & 1) : (bits | 0x400000);
  p->bits = static_cast<uint16_t>(bits >> 16);
}

DZ_INLINE float to_float(float v) { return v; }

DZ_INLINE float to_float(Bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

DZ_INLINE Double8 widen(Float8 v) { return __builtin_convertvector(v, Double8); }

DZ_INLINE double sum(Double8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

DZ_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
DZ_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
DZ_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Prefetches `size` elements that are read (or, with kWrite, written) a few thousand operations later. The hardware
// prefetcher cannot predict these: the accesses in between go elsewhere.
template <bool kWrite, typename T>
DZ_INLINE void prefetch(const T* from, int64_t size) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < size; i += line) __builtin_prefetch(from + i, kWrite ? 1 : 0, 2);
}

// Uninitialised memory aligned to 64 bytes. Allocate it before a parallel region: an exception thrown inside one would
// terminate the process.
template <typename T>
struct Scratch {
  explicit Scratch(int64_t n) : data(static_cast<T*>(::operator new(bytes(n), std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  static size_t bytes(int64_t n) { return static_cast<size_t>(n > 0 ? n : 1) * sizeof(T); }

  T* data;
};

}  // namespace
}  // namespace dz
