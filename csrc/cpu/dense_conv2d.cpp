#include "elementary.h"

namespace dz {
namespace {

// Winograd's F(4x4, 3x3) (Lavin and Gray, CVPR 2016). A tile of 6x6 inputs and a 3x3 kernel are transformed to 36
// values each; their 36 products are transformed to a tile of 4x4 outputs, which directly would take 144 products. The
// weights are transformed once per call. The interpolation points are 0, +-3/4, +-3/2 and infinity: all constants of
// the input and output transforms are exact in float32, and errors are half those of the usual points 0, +-1, +-2.
constexpr int kTile = 4, kPatch = 6, kPoints = kPatch * kPatch;
constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB, kA2B2 = kA2 * kB2;

// The input transform B^T x of six values, to out[0], out[step], ...
DZ_INLINE void inputs(const Vec* x, Vec* out, int step) {
  const Vec even_a = x[4] - kB2 * x[2], odd_a = kA * (x[3] - kB2 * x[1]);
  const Vec even_b = x[4] - kA2 * x[2], odd_b = kB * (x[3] - kA2 * x[1]);
  out[0] = kA2B2 * x[0] - (kA2 + kB2) * x[2] + x[4];
  out[step] = even_a + odd_a;
  out[2 * step] = even_a - odd_a;
  out[3 * step] = even_b + odd_b;
  out[4 * step] = even_b - odd_b;
  out[5 * step] = kA2B2 * x[1] - (kA2 + kB2) * x[3] + x[5];
}

// The output transform A^T m of six products, to out[0], out[step], ...
DZ_INLINE void outputs(const Vec* m, Vec* out, int step) {
  const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  out[0] = m[0] + even_a + even_b;
  out[step] = kA * odd_a + kB * odd_b;
  out[2 * step] = kA2 * even_a + kB2 * even_b;
  out[3 * step] = kA * kA2 * odd_a + kB * kB2 * odd_b + m[5];
}

// The rows of G, the weight transform.
constexpr double kFa = 2.0 * kA2 * (kA2 - kB2), kFb = 2.0 * kB2 * (kB2 - kA2);
constexpr double kG[kPatch][3] = {{1.0 / kA2B2, 0, 0},
                                  {1 / kFa, kA / kFa, kA2 / kFa},
                                  {1 / kFa, -kA / kFa, kA2 / kFa},
                                  {1 / kFb, kB / kFb, kB2 / kFb},
                                  {1 / kFb, -kB / kFb, kB2 / kFb},
                                  {0, 0, 1}};

// weight [O, C, 3, 3] -> out [36][C][Op], zero for channels past O. In float64, as it runs only once per call.
void transform_weights(const float* weight, float* out, int64_t C, int64_t O, int64_t Op) {
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t o = 0; o < Op; o += 8) {
      Double8 w[3][3] = {}, half[kPatch][3];
      for (int64_t k = 0; k < min_of(8, O - o); ++k) {
        for (int t = 0; t < 9; ++t) w[t / 3][t % 3][k] = weight[((o + k) * C + c) * 9 + t];
      }
      for (int i = 0; i < kPatch; ++i) {
        for (int j = 0; j < 3; ++j) half[i][j] = kG[i][0] * w[0][j] + kG[i][1] * w[1][j] + kG[i][2] * w[2][j];
      }
      for (int i = 0; i < kPatch; ++i) {
        for (int j = 0; j < kPatch; ++j) {
          const Double8 value = kG[j][0] * half[i][0] + kG[j][1] * half[i][1] + kG[j][2] * half[i][2];
          const int64_t at = ((i * kPatch + j) * C + c) * Op + o;
          const Float8 rounded = __builtin_convertvector(value, Float8);
          __builtin_memcpy(out + at, &rounded, static_cast<size_t>(min_of(8, Op - o)) * sizeof(float));
        }
      }
    }
  }
}

// Tiles per chunk: the transforms of a chunk stay in L2. A multiple of rows(1), rows(2) and rows(4).
constexpr int64_t kChunk = kLanes == 16 ? 56 : 48;
// Rows of a product whose accumulators, of `registers` registers per row, fit in the register file.
constexpr int rows(int registers) { return (kLanes == 16 ? 28 : 12) / registers; }

// m[r, 0 .. REGISTERS registers) = sum_c v[r, c] u[c, :] for ROWS rows.
template <int REGISTERS>
DZ_INLINE void product(const float* v, const float* u, float* m, int64_t C, int64_t Cp, int64_t Op) {
  constexpr int ROWS = rows(REGISTERS);
  Vec sum[ROWS][REGISTERS] = {};
  for (int64_t c = 0; c < C; ++c) {
    Vec w[REGISTERS];
#pragma GCC unroll 4
    for (int k = 0; k < REGISTERS; ++k) w[k] = load<Vec>(u + c * Op + k * kLanes);
#pragma GCC unroll 28
    for (int r = 0; r < ROWS; ++r) {
      const Vec x = v[r * Cp + c] - Vec{};
#pragma GCC unroll 4
      for (int k = 0; k < REGISTERS; ++k) sum[r][k] += x * w[k];
    }
  }
#pragma GCC unroll 28
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int k = 0; k < REGISTERS; ++k) store(m + r * Op + k * kLanes, sum[r][k]);
  }
}

template <int REGISTERS>
void columns(const float* v, const float* u, float* m, int64_t count, int64_t C, int64_t Cp, int64_t Op) {
  for (int64_t r = 0; r < count; r += rows(REGISTERS)) product<REGISTERS>(v + r * Cp, u, m + r * Op, C, Cp, Op);
}

void multiply(const float* v, const float* u, float* m, int64_t count, int64_t C, int64_t Cp, int64_t Op) {
  int64_t o = 0;
  for (; o + 4 * kLanes <= Op; o += 4 * kLanes) columns<4>(v, u + o, m + o, count, C, Cp, Op);
  if (o + 2 * kLanes <= Op) {
    columns<2>(v, u + o, m + o, count, C, Cp, Op);
    o += 2 * kLanes;
  }
  if (o < Op) columns<1>(v, u + o, m + o, count, C, Cp, Op);
}

struct Images {
  int64_t count, H, W, C, Ho, Wo, O, pad_h, pad_w;
};

// The image of a tile, and its first output pixel.
struct TileOrigin {
  int64_t image, u, v;
};

DZ_INLINE TileOrigin tile_origin(const Images& s, int64_t tile) {
  const int64_t across = ceil_div(s.Wo, kTile), down = ceil_div(s.Ho, kTile);
  return {tile / (across * down), tile / across % down * kTile, tile % across * kTile};
}

// Transforms one tile of delta [count, H, W, C] to v[point * step + c].
DZ_INLINE void gather(const Images& s, const float* delta, const TileOrigin& at, const float* zeros, float* v,
                      int64_t step) {
  const float* from[kPatch][kPatch];
  for (int i = 0; i < kPatch; ++i) {
    const int64_t h = at.u + i - s.pad_h;
    for (int j = 0; j < kPatch; ++j) {
      const int64_t w = at.v + j - s.pad_w;
      const bool inside = (h >= 0) & (h < s.H) & (w >= 0) & (w < s.W);
      from[i][j] = inside ? delta + ((at.image * s.H + h) * s.W + w) * s.C : zeros;
    }
  }
  for (int64_t c = 0; c < s.C; c += kLanes) {
    const int64_t left = min_of(kLanes, s.C - c);
    Vec half[kPatch][kPatch];
#pragma GCC unroll 6
    for (int j = 0; j < kPatch; ++j) {
      Vec x[kPatch];
      if (left == kLanes) {
#pragma GCC unroll 6
        for (int i = 0; i < kPatch; ++i) x[i] = load<Vec>(from[i][j] + c);
      } else {
#pragma GCC unroll 6
        for (int i = 0; i < kPatch; ++i) x[i] = load_partial(from[i][j] + c, left);
      }
      inputs(x, &half[0][j], kPatch);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kPatch; ++i) {
      Vec y[kPatch];
      inputs(half[i], y, 1);
#pragma GCC unroll 6
      for (int j = 0; j < kPatch; ++j) store(v + (i * kPatch + j) * step + c, y[j]);
    }
  }
}

// Transforms the products m[point * step + o] of one tile to out [count, Ho, Wo, O].
DZ_INLINE void scatter(const Images& s, const float* m, int64_t step, const TileOrigin& at, float* out) {
  const int64_t tile_rows = min_of(kTile, s.Ho - at.u), tile_columns = min_of(kTile, s.Wo - at.v);
  float* to = out + ((at.image * s.Ho + at.u) * s.Wo + at.v) * s.O;
  for (int64_t o = 0; o < s.O; o += kLanes) {
    const int64_t left = min_of(kLanes, s.O - o);
    Vec half[kTile][kPatch];
#pragma GCC unroll 6
    for (int j = 0; j < kPatch; ++j) {
      Vec x[kPatch];
#pragma GCC unroll 6
      for (int i = 0; i < kPatch; ++i) x[i] = load<Vec>(m + (i * kPatch + j) * step + o);
      outputs(x, &half[0][j], kPatch);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) {
      Vec y[kTile];
      outputs(half[i], y, 1);
      if (i >= tile_rows) continue;
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) {
        float* pixel = to + (i * s.Wo + j) * s.O + o;
        if (j >= tile_columns) {
        } else if (left == kLanes) {
          store(pixel, y[j]);
        } else {
          store_partial(pixel, y[j], left);
        }
      }
    }
  }
}

}  // namespace

DZ_KERNEL(dense_conv2d, (const float* delta,   // [images, H, W, C]
                         const float* weight,  // [O, C, 3, 3]
                         float* out,           // [images, Ho, Wo, O]
                         int64_t images, int64_t H, int64_t W, int64_t C, int64_t Ho, int64_t Wo, int64_t O,
                         int64_t pad_h, int64_t pad_w)) {
  const Images s = {images, H, W, C, Ho, Wo, O, pad_h, pad_w};
  const int64_t Cp = ceil_div(C, kLanes) * kLanes, Op = ceil_div(O, kLanes) * kLanes;
  const int64_t tiles = images * ceil_div(Ho, kTile) * ceil_div(Wo, kTile);
  Scratch<float> u(kPoints * C * Op), zeros(Cp);
  __builtin_memset(zeros.data, 0, static_cast<size_t>(Cp) * sizeof(float));
  transform_weights(weight, u.data, C, O, Op);
  const int64_t v_size = kPoints * kChunk * Cp, m_size = kPoints * kChunk * Op;
  Scratch<float> scratch(omp_get_max_threads() * (v_size + m_size));

#pragma omp parallel
  {
    float* v = scratch.data + omp_get_thread_num() * (v_size + m_size);
    float* m = v + v_size;

#pragma omp for schedule(static)
    for (int64_t first = 0; first < tiles; first += kChunk) {
      const int64_t count = min_of(kChunk, tiles - first);
      // the product runs over whole blocks of rows: those past the last tile must be finite
      if (count < kChunk) __builtin_memset(v, 0, static_cast<size_t>(v_size) * sizeof(float));
      for (int64_t t = 0; t < count; ++t)
        gather(s, delta, tile_origin(s, first + t), zeros.data, v + t * Cp, kChunk * Cp);
      for (int64_t k = 0; k < kPoints; ++k) {
        multiply(v + k * kChunk * Cp, u.data + k * C * Op, m + k * kChunk * Op, count, C, Cp, Op);
      }
      for (int64_t t = 0; t < count; ++t) scatter(s, m + t * Op, kChunk * Op, tile_origin(s, first + t), out);
    }
  }
}

}  // namespace dz
