#include "common.h"

namespace dz {

DZ_KERNEL(conv2d_tap, (const float* x,        // [N, Cin, H, W] with strides xn, xc, xh, xw
                       const int64_t* coord,  // [P, 4] as (o, c, i, j)
                       const float* step,     // [P]
                       float* out,            // [P, N, Ho, Wo]
                       int64_t P, int64_t N, int64_t H, int64_t W, int64_t Ho, int64_t Wo, int64_t xn, int64_t xc,
                       int64_t xh, int64_t xw, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                       int64_t dil_h, int64_t dil_w, int64_t in_per_group, int64_t out_per_group)) {
  const int64_t row_step = stride_w * xw;
  // Loops over samples outside, over perturbations inside: a sample of x stays in cache for all perturbations.
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t p = 0; p < P; ++p) {
      const int64_t o = coord[4 * p], c = coord[4 * p + 1];
      const int64_t top = coord[4 * p + 2] * dil_h - pad_h, left = coord[4 * p + 3] * dil_w - pad_w;
      const float h = step[p];
      const float* plane = x + n * xn + (o / out_per_group * in_per_group + c) * xc;
      // Output columns begin .. end - 1 read input columns; the others read padding.
      const int64_t begin = left < 0 ? min_of(ceil_div(-left, stride_w), Wo) : 0;
      const int64_t end = max_of(begin, min_of(Wo, left < W ? (W - 1 - left) / stride_w + 1 : 0));
      float* row = out + (p * N + n) * Ho * Wo;
      for (int64_t u = 0; u < Ho; ++u, row += Wo) {
        const int64_t in_row = u * stride_h + top;
        if (in_row < 0 || in_row >= H) {
          for (int64_t v = 0; v < Wo; ++v) row[v] = 0.0f;
          continue;
        }
        const float* from = plane + in_row * xh + left * xw;
        for (int64_t v = 0; v < begin; ++v) row[v] = 0.0f;
        if (row_step == 1) {
          for (int64_t v = begin; v < end; ++v) row[v] = h * from[v];
        } else {
          for (int64_t v = begin; v < end; ++v) row[v] = h * from[v * row_step];
        }
        for (int64_t v = end; v < Wo; ++v) row[v] = 0.0f;
      }
    }
  }
}

}  // namespace dz
