#include "layer_norm.h"

namespace dz {
namespace {

constexpr int64_t kTile = 8192;  // elements of zc per tile: they stay in cache for all perturbations

template <typename In, typename Out>
void run_tiles(const In* delta, const float* zc, const double* var, const float* gamma, Out* out, double eps, int64_t P,
               int64_t R, int64_t M, bool centre) {
  const int64_t rows = max_of(1, min_of(R, kTile / M)), tiles = ceil_div(R, rows);
  const int64_t batch = max_of(1, min_of(kRowBatch, kTile / 4 / M));  // a batch stays in L1
  const int64_t thread_floats = sizeof(In) == sizeof(float) ? 0 : ceil_div(batch * M, 16) * 16;
  Scratch<float> floats(omp_get_max_threads() * thread_floats);
#pragma omp parallel for schedule(static)
  for (int64_t piece = 0; piece < tiles * P; ++piece) {
    const int64_t start = piece / P * rows, p = piece % P;
    const int64_t stop = min_of(R, start + rows);
    for (int64_t r = start; r < stop; r += batch) {
      const int64_t count = min_of(batch, stop - r);
      norm_rows(delta + (p * R + r) * M, floats.data + omp_get_thread_num() * thread_floats, zc + r * M, var + r, gamma,
                out + (p * R + r) * M, M, eps, count, M, centre);
    }
  }
}

}  // namespace

DZ_KERNEL(layer_norm_difference, (const void* delta,                   // [P, R, M] float32, or bfloat16 with half
                                  const float* zc, const double* var,  // [R, M], [R]
                                  const float* gamma,                  // [M] or null: 1
                                  void* out,                           // [P, R, M] float32, or bfloat16 with out_half
                                  double eps, int64_t P, int64_t R, int64_t M, bool centre, bool half, bool out_half)) {
  if (M == 0) return;
  with_types(delta, half, out, out_half,
             [&](const auto* from, auto* to) { run_tiles(from, zc, var, gamma, to, eps, P, R, M, centre); });
}

}  // namespace dz
