#include "attention.h"
#include "linear.h"

namespace dz {
namespace {

// All that one sample needs, of the base and of one perturbation, stays in cache.
template <typename Product, typename In, typename More, typename To>
void all(const In* delta, Norm norm, const float* weight, const float* q, const float* k, const float* v,
         const float* p, const float* project, const More* residual, To* to, float scale, int64_t P, int64_t N,
         int64_t H, int64_t T, int64_t D, int64_t E, int64_t K, int64_t M) {
  typedef typename Product::Number Number;
  const Head head = {true, true, true, T, T, D, E};
  const int64_t columns = 2 * D + E, wide = ceil_div(columns, 16) * 16, last = ceil_div(M, 16) * 16;
  const int64_t filled = ceil_div(T, Product::kRows) * Product::kRows;
  const int64_t in_row = Product::depth(K), attended_row = Product::depth(H * E);
  const int64_t keys_size = head.keys_size(), packed_size = keys_size + head.values_size();
  const int64_t result_size = greater(filled * greater(wide, last), taking(K));
  const int64_t thread_size = H * packed_size + head.rows_size() + result_size;
  const int64_t in_size = filled * in_row, attended_size = ceil_div(filled * attended_row, 32) * 32;
  const int64_t parts = lesser(P, ceil_div(4 * omp_get_max_threads(), N));
  Scratch<float> floats(omp_get_max_threads() * thread_size);
  Scratch<Number> numbers(omp_get_max_threads() * (in_size + attended_size));
  Scratch<Number> weights(H * wide * in_row), projection(last * attended_row);
  for (int64_t h = 0; h < H; ++h) Product::pack(weight + h * columns * K, columns, K, weights.data + h * wide * in_row);
  Product::pack(project, M, H * E, projection.data);
#pragma omp parallel
  {
    [[maybe_unused]] const typename Product::Session session;
    float* packed = floats.data + omp_get_thread_num() * thread_size;
    float *scratch = packed + H * packed_size, *result = scratch + head.rows_size();
    Number* in = numbers.data + omp_get_thread_num() * (in_size + attended_size);
    Number* attended = in + in_size;
    for (int64_t i = 0; i < in_size + attended_size; ++i) in[i] = {};  // what fills rows up stays so
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < N * parts; ++piece) {
      const int64_t n = piece / parts, part = piece % parts;
      for (int64_t h = 0; h < H; ++h) {
        float* keys = packed + h * packed_size;
        head.pack_base(k + (n * H + h) * T * D, D, v + (n * H + h) * T * E, E, keys, keys + keys_size);
      }
      for (int64_t at = part * P / parts; at < (part + 1) * P / parts; ++at) {
        const int64_t first = (at * N + n) * T;
        take_rows(norm, delta + first * K, n * T, T, K, in, in_row, result);
        if (at + 1 < (part + 1) * P / parts) fetch_ahead<false>(delta + (first + N * T) * K, T * K);
        fetch_ahead<true>(to + first * M, T * M);
        for (int64_t h = 0; h < H; ++h) {
          const int64_t b = n * H + h;
          float *keys = packed + h * packed_size, *values = keys + keys_size;
          Product::multiply(in, in_row, filled, weights.data + h * wide * in_row, K, result, wide, columns);
          head.pack_moved(result + D, wide, result + 2 * D, wide, keys, values);
          head.attend(result, wide, q + b * T * D, D, p + b * T * T, keys, values, scale, scratch, attended + h * E,
                      attended_row);
        }
        Product::multiply(attended, attended_row, filled, projection.data, H * E, result, last, M);
        for (int64_t t = 0; t < T; ++t) give_row(result + t * last, residual, to, (first + t) * M, M);
      }
    }
  }
}

}  // namespace

DZ_KERNEL(self_attention_difference,
          (const void* delta,                               // [P, N, T, K] float32, or bfloat16 with half
           const float* zc, const double* var,              // [N, T, K], [N, T]; null: there is no norm
           const float* gamma,                              // [K] or null: 1
           const float* weight,                             // [H, 2 D + E, K]
           const float* q, const float* k, const float* v,  // [N, H, T, D or E]
           const float* p,                                  // [N, H, T, T]
           const float* project,                            // [M, H E]
           const void* residual,  // [P, N, T, M] float32, or bfloat16 with residual_half; null
           void* out,             // [P, N, T, M] float32, or bfloat16 with out_half
           double eps, double scale, int64_t P, int64_t N, int64_t H, int64_t T, int64_t D, int64_t E, int64_t K,
           int64_t M, bool half, bool residual_half, bool out_half,
           bool narrow)) {  // narrow: bfloat16 products of the linear layers
  if (P == 0 || N == 0 || T == 0) return;
  with_types(residual, residual_half, out, out_half, [&](const auto* more, auto* to) {
    const auto run = [&](const auto* from) {
      const Norm norm = {zc, var, gamma, eps};
      const float factor = static_cast<float>(scale);
      if (narrow) {
        all<HalfProduct>(from, norm, weight, q, k, v, p, project, more, to, factor, P, N, H, T, D, E, K, M);
      } else {
        all<VectorProduct<false>>(from, norm, weight, q, k, v, p, project, more, to, factor, P, N, H, T, D, E, K, M);
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
