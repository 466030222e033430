#include "linear.h"

namespace dz {
namespace {

// Float32 rows go straight from delta into the product where there is no norm, and from it into the result.
template <typename Product, typename In, typename More, typename To>
void all(const In* delta, Norm norm, const float* weight, const More* residual, To* to, int64_t P, int64_t R, int64_t K,
         int64_t M) {
  typedef typename Product::Number Number;
  constexpr int64_t kTile = Product::kPlain ? 64 : Product::kRows;  // rows; less where the result has another copy
  constexpr bool kTaken = Product::kPlain && sizeof(In) == sizeof(Number);
  constexpr bool kGiven = Product::kPlain && sizeof(To) == sizeof(float);
  const int64_t wide = ceil_div(M, 16) * 16, in_row = Product::depth(K);
  const int64_t tiles = ceil_div(R, kTile), parts = lesser(P, ceil_div(4 * omp_get_max_threads(), tiles));
  const int64_t result_size = greater(kTile * wide, taking(K)), in_size = kTile * in_row;
  Scratch<float> floats(omp_get_max_threads() * result_size);
  Scratch<Number> numbers(omp_get_max_threads() * in_size), packed(wide * in_row);
  Product::pack(weight, M, K, packed.data);
#pragma omp parallel
  {
    [[maybe_unused]] const typename Product::Session session;
    float* result = floats.data + omp_get_thread_num() * result_size;
    Number* in = numbers.data + omp_get_thread_num() * in_size;
    for (int64_t i = 0; i < in_size; ++i) in[i] = {};  // what fills rows up stays so
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < tiles * parts; ++piece) {
      const int64_t start = piece / parts * kTile, part = piece % parts, rows = lesser(kTile, R - start);
      const int64_t filled = ceil_div(rows, Product::kRows) * Product::kRows;
      for (int64_t p = part * P / parts; p < (part + 1) * P / parts; ++p) {
        const int64_t first = p * R + start;
        const Number* left = in;
        if constexpr (kTaken) left = norm.zc == nullptr ? delta + first * K : in;
        if (left == in) take_rows(norm, delta + first * K, start, rows, K, in, in_row, result);
        if constexpr (kGiven) {
          Product::multiply(left, in_row, filled, packed.data, K, to + first * M, M, M);
          if (residual != nullptr) add(to + first * M, residual + first * M, to + first * M, rows * M);
        } else {
          Product::multiply(left, in_row, filled, packed.data, K, result, wide, M);
          for (int64_t r = 0; r < rows; ++r) give_row(result + r * wide, residual, to, (first + r) * M, M);
        }
      }
    }
  }
}

}  // namespace

DZ_KERNEL(linear_difference, (const void* delta,                   // [P, R, K] float32, or bfloat16 with half
                              const float* zc, const double* var,  // [R, K], [R] of the layer norm; null: there is none
                              const float* gamma,                  // [K] or null: 1
                              const float* weight,                 // [M, K]
                              const void* residual,  // [P, R, M] float32, or bfloat16 with residual_half; may be null
                              void* out,             // [P, R, M] float32, or bfloat16 with out_half
                              double eps, int64_t P, int64_t R, int64_t K, int64_t M, bool half, bool residual_half,
                              bool out_half, bool narrow)) {  // narrow: bfloat16 products
  if (P == 0 || R == 0) return;
  with_types(residual, residual_half, out, out_half, [&](const auto* more, auto* to) {
    const auto run = [&](const auto* from) {
      const Norm norm = {zc, var, gamma, eps};
      if (narrow) {
        all<HalfProduct>(from, norm, weight, more, to, P, R, K, M);
      } else {
        all<VectorProduct<false>>(from, norm, weight, more, to, P, R, K, M);
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
