#include "gelu.h"
#include "linear.h"

namespace dz {
namespace {

constexpr int64_t kMaxBaseFloats = 1 << 17;  // precomputed floats per tile of rows, which stay in cache

// finish(values, at) writes a row of the second product to the result, starting at element `at`.
template <typename Product, typename In, typename To, typename Finish>
void run_tiles(const In* delta, Norm norm, const float* up, const float* z, const float* down, int64_t P, int64_t R,
               int64_t K, int64_t H, int64_t M, bool tanh, const To* to, Finish finish) {
  typedef typename Product::Number Number;
  const int64_t padded_H = ceil_div(H, 16) * 16, padded_M = ceil_div(M, 16) * 16;
  const int64_t in_row = Product::depth(K), hidden_row = Product::depth(H);
  const int64_t tile = 32 * min_of(2, max_of(1, kMaxBaseFloats / (BaseTerms::kRows * padded_H * 32)));  // rows
  const int64_t tiles = ceil_div(R, tile), parts = min_of(P, ceil_div(4 * omp_get_max_threads(), tiles));
  const int64_t base_size = BaseTerms::kRows * tile * padded_H;
  const int64_t result_size = max_of(tile * max_of(padded_H, padded_M), norm_floats(K));
  const int64_t in_size = tile * in_row, hidden_size = ceil_div(tile * hidden_row, 32) * 32;
  Scratch<float> floats(omp_get_max_threads() * (base_size + result_size));
  Scratch<Number> numbers(omp_get_max_threads() * (in_size + hidden_size));
  Scratch<Number> ups(padded_H * in_row), downs(padded_M * hidden_row);
  Product::pack(up, H, K, ups.data);
  Product::pack(down, M, H, downs.data);
#pragma omp parallel
  {
    [[maybe_unused]] const typename Product::Session session;
    float* base_terms = floats.data + omp_get_thread_num() * (base_size + result_size);
    float* result = base_terms + base_size;  // output of the first product, then of the second
    Number* in = numbers.data + omp_get_thread_num() * (in_size + hidden_size);
    Number* hidden = in + in_size;
    for (int64_t i = 0; i < in_size + hidden_size; ++i) in[i] = {};  // padding stays zero
    const BaseTerms bases = {base_terms, tile * padded_H};
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < tiles * parts; ++piece) {
      const int64_t start = piece / parts * tile, part = piece % parts, rows = min_of(tile, R - start);
      const int64_t padded_rows = ceil_div(rows, Product::kRows) * Product::kRows;
      for (int64_t r = 0; r < rows; ++r) {
        const float* base = z + (start + r) * H;
        if (tanh) {
          prepare<true>(base, H, bases.from(r * padded_H));
        } else {
          prepare<false>(base, H, bases.from(r * padded_H));
        }
      }
      for (int64_t p = part * P / parts; p < (part + 1) * P / parts; ++p) {
        const int64_t first = p * R + start;
        load_rows(norm, delta + first * K, start, rows, K, in, in_row, result);
        if (p + 1 < (part + 1) * P / parts) prefetch<false>(delta + (first + R) * K, rows * K);
        prefetch<true>(to + first * M, rows * M);
        Product::multiply(in, in_row, padded_rows, ups.data, K, result, padded_H, H);
        for (int64_t r = 0; r < rows; ++r) {
          if (tanh) {
            changes<true>(bases.from(r * padded_H), result + r * padded_H, hidden + r * hidden_row, H);
          } else {
            changes<false>(bases.from(r * padded_H), result + r * padded_H, hidden + r * hidden_row, H);
          }
        }
        Product::multiply(hidden, hidden_row, padded_rows, downs.data, H, result, padded_M, M);
        for (int64_t r = 0; r < rows; ++r) finish(result + r * padded_M, (first + r) * M);
      }
    }
  }
}

}  // namespace

DZ_KERNEL(mlp_difference,
          (const void* delta,                                   // [P, R, K] float32, or bfloat16 with half
           const float* zc, const double* var,                  // [R, K], [R] of the layer norm; null: no norm
           const float* gamma,                                  // [K]; null: all ones
           const float* up, const float* z, const float* down,  // [H, K], [R, H], [M, H]
           const void* residual,  // [P, R, M] float32, or bfloat16 with residual_half; may be null
           void* out,             // [P, R, M] float32, or bfloat16 with out_half
           double eps, int64_t P, int64_t R, int64_t K, int64_t H, int64_t M, bool tanh, bool half, bool residual_half,
           bool out_half, bool bf16_products)) {  // bf16_products: products of bfloat16 factors
  if (P == 0 || R == 0) return;
  with_types(residual, residual_half, out, out_half, [&](const auto* addend, auto* to) {
    const auto finish = [=](const float* values, int64_t at) { store_row(values, addend, to, at, M); };
    const Norm norm = {zc, var, gamma, eps};
    const auto run = [&](const auto* from) {
      if (bf16_products) {
        run_tiles<HalfProduct>(from, norm, up, z, down, P, R, K, H, M, tanh, to, finish);
      } else {
        run_tiles<VectorProduct<false>>(from, norm, up, z, down, P, R, K, H, M, tanh, to, finish);
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
