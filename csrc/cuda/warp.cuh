// Warp-level PTX instructions of compute capability 8.0: cp.async (asynchronous copies to shared memory), ldmatrix and
// mma (tensor cores). csrc/tests/cuda_on_host.h has the same functions for the host. On older GPUs they trap; dzkernels
// refuses such GPUs before a launch.
#pragma once

#include "common.cuh"

namespace dz {

using bfloat16 = uint16_t;  // its bits

#ifdef __CUDACC__
#define DZ_UNROLL _Pragma("unroll")
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define DZ_ASM(...) __trap()
#else
#define DZ_ASM(...) asm volatile(__VA_ARGS__)
#endif

// The address in shared memory, in bytes.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes, with both addresses aligned to 16. If not `inside`, writes zeros and does not read `from`.
__device__ inline void copy_async(uint32_t to, const void* from, bool inside) {
  DZ_ASM("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// Closes the current group of copies of this thread; it may be empty.
__device__ inline void commit_copies() { DZ_ASM("cp.async.commit_group;\n" :: : "memory"); }

// Waits until at most PENDING groups of this thread are unfinished.
template <int PENDING>
__device__ inline void wait_for_copies() {
  DZ_ASM("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Loads four 8x8 matrices of two-byte values. Lane l passes the address of row l % 8 of matrix l / 8, aligned to 16
// bytes. From each matrix it receives the values 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 (or one four-byte value).
__device__ inline void load_matrices(uint32_t (&out)[4], uint32_t row) {
  DZ_ASM("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n" : "=r"(out[0]), "=r"(out[1]),
         "=r"(out[2]), "=r"(out[3]) : "r"(row) : "memory");
}

// sum [16, 8] += a [16, k] b [k, 8] in float32, with k = 16 (bfloat16) or k = 8 (tf32, the upper 19 bits of a float32).
// Lane l holds
//   sum  columns 2 (l % 4), 2 (l % 4) + 1 of row l / 4, then of row l / 4 + 8
//   a    four matrices as load_matrices returns them: rows 0..7 and 8..15 of the first 16 bytes, then of the second
//   b    two matrices of b transposed: the first 16 bytes, then the second
__device__ inline void multiply_bfloat16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
  DZ_ASM(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n" : "+f"(sum[0]),
      "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
  DZ_ASM(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n" : "+f"(sum[0]),
      "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds two values to bfloat16; `low` goes to the lower half.
__device__ inline uint32_t round_to_bfloat16(float low, float high) {
  uint32_t bits = 0;
  DZ_ASM("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t as_bits(float value) { return __float_as_uint(value); }

// Stores 8 or 16 bytes at once. `to` is aligned to that size.
__device__ inline void store_words(void* to, const uint32_t (&words)[2]) {
  *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
}
__device__ inline void store_words(void* to, const uint32_t (&words)[4]) {
  *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}
#else
#define DZ_UNROLL
using namespace cuda_on_host::warp;
#endif

}  // namespace dz
