#include "cross_entropy.h"

namespace dz {

DZ_KERNEL(channel_linear_cross_entropy, (const float* delta,                            // [P, N]
                                         const int64_t* channel,                        // [P] input feature
                                         const float* weight,                           // [K, C] with strides wk, wc
                                         const double* log_probs, const double* probs,  // [N, K] each
                                         const int64_t* target,                         // [N]
                                         double* out,                                   // [P]
                                         int64_t P, int64_t N, int64_t K, int64_t wk, int64_t wc)) {
  mean_change(log_probs, probs, out, P, N, K, [=](int64_t p) {
    return [=](const int64_t* n, double* e) {
      const float *own = weight + channel[p] * wc, *d = delta + p * N;
      Doubles difference, at_target;
      for (int64_t i = 0; i < kDoubles; ++i) {
        difference[i] = d[n[i]];
        at_target[i] = own[target[n[i]] * wk];
      }
      for (int64_t k = 0; k < K; ++k) {
        store(e + k * kDoubles, difference * (static_cast<double>(own[k * wk]) - at_target));
      }
    };
  });
}

}  // namespace dz
