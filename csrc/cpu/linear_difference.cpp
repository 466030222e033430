#include "linear.h"

namespace dz {
namespace {

// Where types allow it, the product reads delta in place (no norm) and writes the result in place.
template <typename Product, typename In, typename Residual, typename To>
void run_tiles(const In* delta, Norm norm, const float* weight, const Residual* residual, To* to, int64_t P, int64_t R,
               int64_t K, int64_t M) {
  typedef typename Product::Number Number;
  constexpr int64_t kTile = Product::kUnpadded ? 64 : Product::kRows;  // rows; fewer where the result is buffered
  constexpr bool kReadsInPlace = Product::kUnpadded && sizeof(In) == sizeof(Number);
  constexpr bool kWritesInPlace = Product::kUnpadded && sizeof(To) == sizeof(float);
  const int64_t padded_M = ceil_div(M, 16) * 16, in_row = Product::depth(K);
  const int64_t tiles = ceil_div(R, kTile), parts = min_of(P, ceil_div(4 * omp_get_max_threads(), tiles));
  const int64_t result_size = max_of(kTile * padded_M, norm_floats(K)), in_size = kTile * in_row;
  Scratch<float> floats(omp_get_max_threads() * result_size);
  Scratch<Number> numbers(omp_get_max_threads() * in_size), packed(padded_M * in_row);
  Product::pack(weight, M, K, packed.data);
#pragma omp parallel
  {
    [[maybe_unused]] const typename Product::Session session;
    float* result = floats.data + omp_get_thread_num() * result_size;
    Number* in = numbers.data + omp_get_thread_num() * in_size;
    for (int64_t i = 0; i < in_size; ++i) in[i] = {};  // padding stays zero
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < tiles * parts; ++piece) {
      const int64_t start = piece / parts * kTile, part = piece % parts, rows = min_of(kTile, R - start);
      const int64_t padded_rows = ceil_div(rows, Product::kRows) * Product::kRows;
      for (int64_t p = part * P / parts; p < (part + 1) * P / parts; ++p) {
        const int64_t first = p * R + start;
        const Number* left = in;
        if constexpr (kReadsInPlace) left = norm.zc == nullptr ? delta + first * K : in;
        if (left == in) load_rows(norm, delta + first * K, start, rows, K, in, in_row, result);
        if constexpr (kWritesInPlace) {
          Product::multiply(left, in_row, padded_rows, packed.data, K, to + first * M, M, M);
          if (residual != nullptr) add(to + first * M, residual + first * M, to + first * M, rows * M);
        } else {
          Product::multiply(left, in_row, padded_rows, packed.data, K, result, padded_M, M);
          for (int64_t r = 0; r < rows; ++r) store_row(result + r * padded_M, residual, to, (first + r) * M, M);
        }
      }
    }
  }
}

}  // namespace

DZ_KERNEL(linear_difference, (const void* delta,                   // [P, R, K] float32, or bfloat16 with half
                              const float* zc, const double* var,  // [R, K], [R] of the layer norm; null: no norm
                              const float* gamma,                  // [K]; null: all ones
                              const float* weight,                 // [M, K]
                              const void* residual,  // [P, R, M] float32, or bfloat16 with residual_half; may be null
                              void* out,             // [P, R, M] float32, or bfloat16 with out_half
                              double eps, int64_t P, int64_t R, int64_t K, int64_t M, bool half, bool residual_half,
                              bool out_half, bool bf16_products)) {  // bf16_products: products of bfloat16 factors
  if (P == 0 || R == 0) return;
  with_types(residual, residual_half, out, out_half, [&](const auto* addend, auto* to) {
    const auto run = [&](const auto* from) {
      const Norm norm = {zc, var, gamma, eps};
      if (bf16_products) {
        run_tiles<HalfProduct>(from, norm, weight, addend, to, P, R, K, M);
      } else {
        run_tiles<VectorProduct<false>>(from, norm, weight, addend, to, P, R, K, M);
      }
    };
    if (half) {
      run(static_cast<const Bf16*>(delta));
    } else {
      run(static_cast<const float*>(delta));
    }
  });
}

}  // namespace dz
