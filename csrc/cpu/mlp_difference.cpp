#include "gelu.h"
#include "linear.h"

namespace dz {
namespace {

constexpr int64_t kKnown = 1 << 17;  // numbers known of the bases of a tile of rows, which stay in cache

// finish(values, row of the result, index of its first element)
template <typename Product, typename In, typename To, typename Finish>
void all(const In* delta, Norm norm, const float* up, const float* z, const float* down, int64_t P, int64_t R,
         int64_t K, int64_t H, int64_t M, bool tanh, const To* to, Finish finish) {
  typedef typename Product::Number Number;
  const int64_t wide = ceil_div(H, 16) * 16, last = ceil_div(M, 16) * 16;
  const int64_t in_row = Product::depth(K), hidden_row = Product::depth(H);
  const int64_t tile = 32 * lesser(2, greater(1, kKnown / (Bases::kRows * wide * 32)));  // rows
  const int64_t tiles = ceil_div(R, tile), parts = lesser(P, ceil_div(4 * omp_get_max_threads(), tiles));
  const int64_t known_size = Bases::kRows * tile * wide;
  const int64_t result_size = greater(tile * greater(wide, last), taking(K));
  const int64_t in_size = tile * in_row, hidden_size = ceil_div(tile * hidden_row, 32) * 32;
  Scratch<float> floats(omp_get_max_threads() * (known_size + result_size));
  Scratch<Number> numbers(omp_get_max_threads() * (in_size + hidden_size));
  Scratch<Number> ups(wide * in_row), downs(last * hidden_row);
  Product::pack(up, H, K, ups.data);
  Product::pack(down, M, H, downs.data);
#pragma omp parallel
  {
    [[maybe_unused]] const typename Product::Session session;
    float* known = floats.data + omp_get_thread_num() * (known_size + result_size);
    float* result = known + known_size;  // of the first product, then of the second
    Number* in = numbers.data + omp_get_thread_num() * (in_size + hidden_size);
    Number* hidden = in + in_size;
    for (int64_t i = 0; i < in_size + hidden_size; ++i) in[i] = {};  // what fills rows up stays so
    const Bases bases = {known, tile * wide};
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < tiles * parts; ++piece) {
      const int64_t start = piece / parts * tile, part = piece % parts, rows = lesser(tile, R - start);
      const int64_t filled = ceil_div(rows, Product::kRows) * Product::kRows;
      for (int64_t r = 0; r < rows; ++r) {
        const float* base = z + (start + r) * H;
        if (tanh) {
          prepare<true>(base, H, bases.from(r * wide));
        } else {
          prepare<false>(base, H, bases.from(r * wide));
        }
      }
      for (int64_t p = part * P / parts; p < (part + 1) * P / parts; ++p) {
        const int64_t first = p * R + start;
        take_rows(norm, delta + first * K, start, rows, K, in, in_row, result);
        if (p + 1 < (part + 1) * P / parts) fetch_ahead<false>(delta + (first + R) * K, rows * K);
        fetch_ahead<true>(to + first * M, rows * M);
        Product::multiply(in, in_row, filled, ups.data, K, result, wide, H);
        for (int64_t r = 0; r < rows; ++r) {
          if (tanh) {
            changes<true>(bases.from(r * wide), result + r * wide, hidden + r * hidden_row, H);
          } else {
            changes<false>(bases.from(r * wide), result + r * wide, hidden + r * hidden_row, H);
          }
        }
        Product::multiply(hidden, hidden_row, filled, downs.data, H, result, last, M);
        for (int64_t r = 0; r < rows; ++r) finish(result + r * last, (first + r) * M);
      }
    }
  }
}

}  // namespace

DZ_KERNEL(mlp_difference, (const void* delta,                   // [P, R, K] float32, or bfloat16 with half
                           const float* zc, const double* var,  // [R, K], [R] of the layer norm; null: there is none
                           const float* gamma,                  // [K] or null: 1
                           const float* up, const float* z, const float* down,  // [H, K], [R, H], [M, H]
                           const void* residual,  // [P, R, M] float32, or bfloat16 with residual_half; may be null
                           void* out,             // [P, R, M] float32, or bfloat16 with out_half
                           double eps, int64_t P, int64_t R, int64_t K, int64_t H, int64_t M, bool tanh, bool half,
                           bool residual_half, bool out_half, bool narrow)) {  // narrow: bfloat16 products
  if (P == 0 || R == 0) return;
  with_types(residual, residual_half, out, out_half, [&](const auto* more, auto* to) {
    const auto finish = [=](const float* values, int64_t at) { give_row(values, more, to, at, M); };
    const Norm norm = {zc, var, gamma, eps};
    const auto run = [&](const auto* from) {
      if (narrow) {
        all<HalfProduct>(from, norm, up, z, down, P, R, K, H, M, tanh, to, finish);
      } else {
        all<VectorProduct<false>>(from, norm, up, z, down, P, R, K, H, M, tanh, to, finish);
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
