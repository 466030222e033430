// Every CPU op, once: its name and its signature. The table, the dispatcher and the Python bindings are made from this
// list.
//
// P perturbations, N samples, [H, W] input plane, [Ho, Wo] output plane. Strides are in elements. Tensors without
// strides are contiguous. Arguments are checked by dzkernels/ops/<op>.py, which also holds the contract of the op.
#pragma once

#include <cstdint>

// clang-format off
#define DZ_CPU_OPS(OP)                                                                                                 \
  OP(conv2d_tap, (const float* x,          /* [N, Cin, H, W] with strides xn, xc, xh, xw                           */  \
                  const int64_t* coord,    /* [P, 4] as (o, c, i, j)                                               */  \
                  const float* step,       /* [P]                                                                  */  \
                  float* out,              /* [P, N, Ho, Wo]                                                       */  \
                  int64_t P, int64_t N, int64_t H, int64_t W, int64_t Ho, int64_t Wo,                                  \
                  int64_t xn, int64_t xc, int64_t xh, int64_t xw, int64_t stride_h, int64_t stride_w,                  \
                  int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w,                                          \
                  int64_t in_per_group, int64_t out_per_group))                                                        \
  OP(channel_conv2d, (const float* delta,  /* [P, N, H, W]                                                         */  \
                      const int64_t* channel, /* [P] input channel                                                 */  \
                      const float* weight, /* [O, in_per_group, kh, kw] with strides wo, wc, wh, ww                */  \
                      void* out,           /* [P, N, Ho, Wo, O] float32, or bfloat16 with half                     */  \
                      int64_t P, int64_t N, int64_t H, int64_t W, int64_t Ho, int64_t Wo, int64_t O,                   \
                      int64_t kh, int64_t kw, int64_t wo, int64_t wc, int64_t wh, int64_t ww,                          \
                      int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,                                \
                      int64_t dil_h, int64_t dil_w, int64_t in_per_group, int64_t out_per_group, bool half))           \
  OP(dense_conv2d, (const float* delta,    /* [images, H, W, C]                                                    */  \
                    const float* weight,   /* [O, C, 3, 3]                                                         */  \
                    float* out,            /* [images, Ho, Wo, O]                                                  */  \
                    int64_t images, int64_t H, int64_t W, int64_t C, int64_t Ho, int64_t Wo, int64_t O,                \
                    int64_t pad_h, int64_t pad_w))                                                                     \
  OP(channel_batch_norm, (const float* delta, /* [P, N, H, W]                                                      */  \
                          const int64_t* channel, /* [P]                                                           */  \
                          const float* x,  /* [N, C, H, W] with strides xn, xc, xh, xw                             */  \
                          const double* mean, const double* var, const double* gamma, /* [C] each                  */  \
                          const float* y,  /* [N, C, H, W] with strides yn, yc, yh, yw, or null: no activation     */  \
                          const float* gap, /* [N, C, H, W] with strides gn, gc, gh, gw, or null: no pooling       */  \
                          float* out,      /* [P, N, H / pool, W / pool]                                           */  \
                          double eps, int64_t P, int64_t N, int64_t H, int64_t W,                                      \
                          int64_t xn, int64_t xc, int64_t xh, int64_t xw,                                              \
                          int64_t yn, int64_t yc, int64_t yh, int64_t yw,                                              \
                          int64_t gn, int64_t gc, int64_t gh, int64_t gw, int64_t pool, bool training))                                             \
  OP(dense_batch_norm, (const void* delta, /* [P, N, H, W, C] float32, or bfloat16 with delta_half                 */  \
                        const float* zc,   /* [N, H, W, C]                                                         */  \
                        const double* var, const double* gamma, /* [C] each                                        */  \
                        const void* residual, /* null, or [P, N, H, W, C] float32 (bfloat16 with residual_half);   */  \
                                           /* [P, N, H, W] float32 with residual_channel                           */  \
                        const int64_t* residual_channel, /* [P] or null                                            */  \
                        const float* y,    /* [N, H, W, C] or null: no activation                                  */  \
                        const float* gap,  /* [N, H, W, C] or null: no pooling                                     */  \
                        void* out,         /* [P, N, H / pool, W / pool, C] float32, or bfloat16 with out_half     */  \
                        double eps, int64_t P, int64_t N, int64_t H, int64_t W, int64_t C, int64_t pool,               \
                        bool training, bool delta_half, bool residual_half, bool out_half))                            \
  OP(conv2d_tap_batch_norm, (const float* x, /* [Cin, N, H, W]                                                     */  \
                             const int64_t* coord, const float* step, /* [P, 4] as (o, c, i, j), [P]               */  \
                             const float* zc, /* [O, N, Ho, Wo]                                                    */  \
                             const double* var, const double* gamma, const double* beta, /* [O] each               */  \
                             float* out,   /* [P, N, Ho / pool, Wo / pool]                                         */  \
                             double eps, int64_t P, int64_t N, int64_t H, int64_t W, int64_t Ho, int64_t Wo,           \
                             int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,                         \
                             int64_t dil_h, int64_t dil_w, int64_t in_per_group, int64_t out_per_group,                \
                             int64_t pool, bool training, bool relu))                                                  \
  OP(channel_conv2d_batch_norm, (const float* delta, /* [P, N, H, W]                                               */  \
                                 const int64_t* channel, /* [P] input channel                                      */  \
                                 const float* weight, /* [O, C, kh, kw]                                            */  \
                                 const float* zc, /* [O, N, Ho, Wo]                                                */  \
                                 const double* var, const double* gamma, const double* beta, /* [O] each           */  \
                                 void* out, /* [P, N, Ho / pool, Wo / pool, O], with mean [P, N, O]; float32,      */  \
                                            /* or bfloat16 with half                                               */  \
                                 double eps, int64_t P, int64_t N, int64_t H, int64_t W, int64_t Ho, int64_t Wo,       \
                                 int64_t C, int64_t O, int64_t kh, int64_t kw, int64_t stride_h, int64_t stride_w,     \
                                 int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w,                           \
                                 int64_t pool, bool training, bool relu, bool mean, bool half))                                   \
  OP(channel_linear_cross_entropy, (const float* delta, /* [P, N]                                                  */  \
                                    const int64_t* channel, /* [P] input feature                                   */  \
                                    const float* weight, /* [K, C] with strides wk, wc                             */  \
                                    const double* log_probs, const double* probs, /* [N, K] each                   */  \
                                    const int64_t* target, /* [N]                                                  */  \
                                    double* out,           /* [P]                                                  */  \
                                    int64_t P, int64_t N, int64_t K, int64_t wk, int64_t wc))                          \
  OP(cross_entropy_difference, (const double* log_probs, const double* probs, /* [N, K] each                       */  \
                                const int64_t* target, /* [N]                                                      */  \
                                const float* dlogits,  /* [P, N, K]                                                */  \
                                double* out,           /* [P]                                                      */  \
                                int64_t P, int64_t N, int64_t K))                                                      \
  OP(gelu_difference, (const void* delta, /* [P, S] float32, or bfloat16 with half                                 */  \
                       const float* z,     /* [S]                                                                  */  \
                       void* out,          /* [P, S] float32, or bfloat16 with out_half                            */  \
                       int64_t P, int64_t S, bool tanh, bool half, bool out_half))                                     \
  OP(layer_norm_difference, (const void* delta, /* [P, R, M] float32, or bfloat16 with half                        */  \
                             const float* zc, const double* var, /* [R, M], [R]                                    */  \
                             const float* gamma, /* [M] or null: 1                                                 */  \
                             void* out,    /* [P, R, M] float32, or bfloat16 with out_half                         */  \
                             double eps, int64_t P, int64_t R, int64_t M, bool centre, bool half, bool out_half))      \
  OP(softmax_difference, (const float* delta, /* [P, R, K]                                                         */  \
                          const float* p,  /* [R, K]                                                               */  \
                          float* out,      /* [P, R, K]                                                            */  \
                          int64_t P, int64_t R, int64_t K, bool log))                                                  \
  OP(attention_difference, (const void* dq, /* [P, N, H, T, D] float32, or bfloat16 with half; may be null         */  \
                            const void* dk, /* [P, N, H, S, D]  likewise                                           */  \
                            const void* dv, /* [P, N, H, S, E]  likewise                                           */  \
                            const float* q, /* [N, H, T, D]                                                        */  \
                            const float* k, const float* v, /* [N, H, S, D], [N, H, S, E]                          */  \
                            const float* p, /* [N, H, T, S]                                                        */  \
                            void* out, /* [P, N, T, H, E] float32, or bfloat16 with out_half                       */  \
                            const int64_t* strides, /* [6, 4] of dq, dk, dv, q, k, v along P, N, H and rows        */  \
                            double scale, int64_t P, int64_t N, int64_t H, int64_t T, int64_t S, int64_t D,            \
                            int64_t E, bool half, bool out_half))                                                      \
  OP(mlp_difference, (const void* delta,   /* [P, R, K] float32, or bfloat16 with half                             */  \
                      const float* zc, const double* var, /* [R, K], [R] of the layer norm; null: there is none    */  \
                      const float* gamma,  /* [K] or null: 1                                                       */  \
                      const float* up, const float* z, const float* down, /* [H, K], [R, H], [M, H]                */  \
                      const void* residual, /* [P, R, M] float32, or bfloat16 with residual_half; may be null      */  \
                      void* out,           /* [P, R, M] float32, or bfloat16 with out_half                         */  \
                      double eps, int64_t P, int64_t R, int64_t K, int64_t H, int64_t M, bool tanh,                    \
                      bool half, bool residual_half, bool out_half, bool narrow)) /* narrow: bfloat16 products */      \
  OP(linear_difference, (const void* delta, /* [P, R, K] float32, or bfloat16 with half                            */  \
                         const float* zc, const double* var, /* [R, K], [R] of the layer norm; null: there is none */  \
                         const float* gamma, /* [K] or null: 1                                                     */  \
                         const float* weight, /* [M, K]                                                            */  \
                         const void* residual, /* [P, R, M] float32, or bfloat16 with residual_half; may be null   */  \
                         void* out,        /* [P, R, M] float32, or bfloat16 with out_half                         */  \
                         double eps, int64_t P, int64_t R, int64_t K, int64_t M, bool half, bool residual_half,        \
                         bool out_half, bool narrow)) /* narrow: bfloat16 products                                 */  \
  OP(self_attention_difference, (const void* delta, /* [P, N, T, K] float32, or bfloat16 with half                 */  \
                                 const float* zc, const double* var, /* [N, T, K], [N, T]; null: there is no norm  */  \
                                 const float* gamma, /* [K] or null: 1                                             */  \
                                 const float* weight, /* [H, 2 D + E, K]                                           */  \
                                 const float* q, const float* k, const float* v, /* [N, H, T, D or E]              */  \
                                 const float* p, /* [N, H, T, T]                                                   */  \
                                 const float* project, /* [M, H E]                                                 */  \
                                 const void* residual, /* [P, N, T, M] float32, or bfloat16 with residual_half; null */ \
                                 void* out, /* [P, N, T, M] float32, or bfloat16 with out_half                     */  \
                                 double eps, double scale, int64_t P, int64_t N, int64_t H, int64_t T, int64_t D,      \
                                 int64_t E, int64_t K, int64_t M, bool half, bool residual_half, bool out_half,        \
                                 bool narrow)) /* narrow: bfloat16 products of the linear layers                   */
// clang-format on
