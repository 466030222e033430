#include "attention.h"
#include "linear.h"

namespace dz {
namespace {

// Loops over samples outside, over perturbations inside: the base values of a sample stay in cache.
template <typename Product, typename In, typename Residual, typename To>
void run_samples(const In* delta, Norm norm, const float* weight, const float* q, const float* k, const float* v,
                 const float* p, const float* project, const Residual* residual, To* to, float scale, int64_t P,
                 int64_t N, int64_t H, int64_t T, int64_t D, int64_t E, int64_t K, int64_t M) {
  typedef typename Product::Number Number;
  const Head head = {true, true, true, T, T, D, E};
  const int64_t columns = 2 * D + E, padded_columns = ceil_div(columns, 16) * 16, padded_M = ceil_div(M, 16) * 16;
  const int64_t padded_rows = ceil_div(T, Product::kRows) * Product::kRows;
  const int64_t in_row = Product::depth(K), attended_row = Product::depth(H * E);
  const int64_t keys_size = head.keys_size(), packed_size = keys_size + head.values_size();
  const int64_t result_size = max_of(padded_rows * max_of(padded_columns, padded_M), norm_floats(K));
  const int64_t thread_size = H * packed_size + head.rows_size() + result_size;
  const int64_t in_size = padded_rows * in_row, attended_size = ceil_div(padded_rows * attended_row, 32) * 32;
  const int64_t parts = min_of(P, ceil_div(4 * omp_get_max_threads(), N));
  Scratch<float> floats(omp_get_max_threads() * thread_size);
  Scratch<Number> numbers(omp_get_max_threads() * (in_size + attended_size));
  Scratch<Number> weights(H * padded_columns * in_row), projection(padded_M * attended_row);
  for (int64_t h = 0; h < H; ++h)
    Product::pack(weight + h * columns * K, columns, K, weights.data + h * padded_columns * in_row);
  Product::pack(project, M, H * E, projection.data);
#pragma omp parallel
  {
    [[maybe_unused]] const typename Product::Session session;
    float* packed = floats.data + omp_get_thread_num() * thread_size;
    float *scratch = packed + H * packed_size, *result = scratch + head.rows_size();
    Number* in = numbers.data + omp_get_thread_num() * (in_size + attended_size);
    Number* attended = in + in_size;
    for (int64_t i = 0; i < in_size + attended_size; ++i) in[i] = {};  // padding stays zero
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < N * parts; ++piece) {
      const int64_t n = piece / parts, part = piece % parts;
      for (int64_t h = 0; h < H; ++h) {
        float* keys = packed + h * packed_size;
        head.pack_base(k + (n * H + h) * T * D, D, v + (n * H + h) * T * E, E, keys, keys + keys_size);
      }
      for (int64_t at = part * P / parts; at < (part + 1) * P / parts; ++at) {
        const int64_t first = (at * N + n) * T;
        load_rows(norm, delta + first * K, n * T, T, K, in, in_row, result);
        if (at + 1 < (part + 1) * P / parts) prefetch<false>(delta + (first + N * T) * K, T * K);
        prefetch<true>(to + first * M, T * M);
        for (int64_t h = 0; h < H; ++h) {
          const int64_t b = n * H + h;
          float *keys = packed + h * packed_size, *values = keys + keys_size;
          Product::multiply(in, in_row, padded_rows, weights.data + h * padded_columns * in_row, K, result,
                            padded_columns, columns);
          head.pack_perturbed(result + D, padded_columns, result + 2 * D, padded_columns, keys, values);
          head.attend(result, padded_columns, q + b * T * D, D, p + b * T * T, keys, values, scale, scratch,
                      attended + h * E, attended_row);
        }
        Product::multiply(attended, attended_row, padded_rows, projection.data, H * E, result, padded_M, M);
        for (int64_t t = 0; t < T; ++t) store_row(result + t * padded_M, residual, to, (first + t) * M, M);
      }
    }
  }
}

}  // namespace

DZ_KERNEL(self_attention_difference,
          (const void* delta,                               // [P, N, T, K] float32, or bfloat16 with half
           const float* zc, const double* var,              // [N, T, K], [N, T]; null: no norm
           const float* gamma,                              // [K]; null: all ones
           const float* weight,                             // [H, 2 D + E, K]
           const float* q, const float* k, const float* v,  // [N, H, T, D or E]
           const float* p,                                  // [N, H, T, T]
           const float* project,                            // [M, H E]
           const void* residual,  // [P, N, T, M] float32, or bfloat16 with residual_half; null
           void* out,             // [P, N, T, M] float32, or bfloat16 with out_half
           double eps, double scale, int64_t P, int64_t N, int64_t H, int64_t T, int64_t D, int64_t E, int64_t K,
           int64_t M, bool half, bool residual_half, bool out_half,
           bool bf16_products)) {  // bf16_products: products of bfloat16 factors of the linear layers
  if (P == 0 || N == 0 || T == 0) return;
  with_types(residual, residual_half, out, out_half, [&](const auto* addend, auto* to) {
    const auto run = [&](const auto* from) {
      const Norm norm = {zc, var, gamma, eps};
      const float factor = static_cast<float>(scale);
      if (bf16_products) {
        run_samples<HalfProduct>(from, norm, weight, q, k, v, p, project, addend, to, factor, P, N, H, T, D, E, K, M);
      } else {
        run_samples<VectorProduct<false>>(from, norm, weight, q, k, v, p, project, addend, to, factor, P, N, H, T, D, E,
                                          K, M);
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
