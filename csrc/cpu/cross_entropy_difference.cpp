#include "cross_entropy.h"

namespace dz {

DZ_KERNEL(cross_entropy_difference, (const double* log_probs, const double* probs,  // [N, K] each
                                     const int64_t* target,                         // [N]
                                     const float* dlogits,                          // [P, N, K]
                                     double* out,                                   // [P]
                                     int64_t P, int64_t N, int64_t K)) {
  mean_change(log_probs, probs, out, P, N, K, [=](int64_t p) {
    return [=](const int64_t* n, double* e) {
      const float* rows[kDoubles];
      Floats at_target;
      for (int64_t i = 0; i < kDoubles; ++i) {
        rows[i] = dlogits + (p * N + n[i]) * K;
        at_target[i] = rows[i][target[n[i]]];
      }
      const Doubles base = widen_floats(at_target);
      for (int64_t k = 0; k < K; ++k) {
        Floats d;
#pragma GCC unroll 8
        for (int64_t i = 0; i < kDoubles; ++i) d[i] = rows[i][k];
        store(e + k * kDoubles, widen_floats(d) - base);
      }
    };
  });
}

}  // namespace dz
