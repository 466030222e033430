#include "elementary.h"

namespace dz {
namespace {

// Pixels of a tile with one or two registers of channels each: the accumulators take half of the 32 (AVX-512) or 16
// registers.
constexpr int kPixels = kLanes == 16 ? 8 : 4;
constexpr int pixels(int registers) { return 2 * kPixels / registers; }

// Strides of a tile: where its taps read and where its pixels are written.
struct Taps {
  const int64_t* offset;  // [count], of each tap from the first, in the padded plane
  int64_t count;          // kh * kw
  int64_t row_in;         // from one output row to the next, in the padded plane
  int64_t pixel_in;       // from one output pixel to the next, in the padded plane
  int64_t pixel_out;      // from one output pixel to the next, in the output
};

// out[q, 0 .. channels) = sum_t in[q * pixel_in + offset[t]] * packed[t, :] for PIXELS pixels and REGISTERS registers
// of channels. The accumulators stay in registers. The sum runs over t in order whatever the tile shape.
template <int PIXELS, int REGISTERS, typename Out>
DZ_INLINE void tile(const Taps& taps, const float* in, const float* packed, Out* out, int64_t channels) {
  Vec sum[PIXELS][REGISTERS];
#pragma GCC unroll 16
  for (int q = 0; q < PIXELS; ++q) {
#pragma GCC unroll 2
    for (int r = 0; r < REGISTERS; ++r) sum[q][r] = Vec{};
  }
  for (int64_t t = 0; t < taps.count; ++t) {
    const float* from = in + taps.offset[t];
    Vec w[REGISTERS];
#pragma GCC unroll 2
    for (int r = 0; r < REGISTERS; ++r) w[r] = load<Vec>(packed + (t * REGISTERS + r) * kLanes);
#pragma GCC unroll 16
    for (int q = 0; q < PIXELS; ++q) {
      const Vec d = from[q * taps.pixel_in] - Vec{};
#pragma GCC unroll 2
      for (int r = 0; r < REGISTERS; ++r) sum[q][r] += d * w[r];
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < PIXELS; ++q) {
#pragma GCC unroll 2
    for (int r = 0; r < REGISTERS; ++r) {
      Out* to = out + q * taps.pixel_out + r * kLanes;
      const int64_t left = channels - r * kLanes;
      if (left >= kLanes) {
        store_vec(to, sum[q][r]);
      } else if (left > 0) {
        store_first(to, sum[q][r], left);
      }
    }
  }
}

// All output rows, of `width` pixels each. The last tile of a row overlaps the previous one and writes the same values
// again.
template <int PIXELS, int REGISTERS, typename Out>
void tiles(const Taps& taps, const float* in, const float* packed, Out* out, int64_t channels, int64_t width,
           int64_t rows) {
  if (width >= PIXELS) {
    for (int64_t u = 0; u < rows; ++u, in += taps.row_in, out += width * taps.pixel_out) {
      for (int64_t v = 0; v < width; v += PIXELS) {
        const int64_t at = min_of(v, width - PIXELS);
        tile<PIXELS, REGISTERS>(taps, in + at * taps.pixel_in, packed, out + at * taps.pixel_out, channels);
      }
    }
  } else if constexpr (PIXELS > 1) {
    tiles<PIXELS / 2, REGISTERS>(taps, in, packed, out, channels, width, rows);
  }
}

// For runs so short that calling memcpy would cost more than the copy.
DZ_INLINE void copy(const float* from, float* to, int64_t size) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) store(to + i, load<Float8>(from + i));
  for (; i < size; ++i) to[i] = from[i];
}

template <typename Out>
void convolve(const float* delta, const int64_t* channel, const float* weight, Out* out, int64_t P, int64_t N,
              int64_t H, int64_t W, int64_t Ho, int64_t Wo, int64_t O, int64_t kh, int64_t kw, int64_t wo, int64_t wc,
              int64_t wh, int64_t ww, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h,
              int64_t dil_w, int64_t in_per_group, int64_t out_per_group) {
  const int64_t T = kh * kw;
  const int64_t Hp = H + 2 * pad_h, Wp = W + 2 * pad_w;
  const int64_t block = 2 * kLanes;                                          // output channels of a full tile
  const int64_t padded_channels = ceil_div(out_per_group, kLanes) * kLanes;  // out_per_group rounded up to registers
  const int64_t threads = omp_get_max_threads();

  Scratch<int64_t> offset(T);
  for (int64_t t = 0; t < T; ++t) offset.data[t] = t / kw * dil_h * Wp + t % kw * dil_w;
  const Taps taps = {offset.data, T, stride_h * Wp, stride_w, O};
  // Per thread: the weights of one input channel, packed [block][T][channels of the block], and one padded plane, each
  // rounded up to whole cache lines: threads must not share one.
  const int64_t packed_size = ceil_div(T * padded_channels, 16) * 16, plane_size = ceil_div(Hp * Wp, 16) * 16;
  Scratch<float> scratch(threads * (packed_size + plane_size));

#pragma omp parallel
  {
    float* packed = scratch.data + omp_get_thread_num() * (packed_size + plane_size);
    float* plane = packed + packed_size;
    __builtin_memset(plane, 0, static_cast<size_t>(plane_size) * sizeof(float));  // the border stays zero
    int64_t packed_channel = -1;

#pragma omp for collapse(2) schedule(static)
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t n = 0; n < N; ++n) {
        const int64_t first = channel[p] / in_per_group * out_per_group;  // first output channel of the group
        if (packed_channel != channel[p]) {
          packed_channel = channel[p];
          const float* from = weight + first * wo + channel[p] % in_per_group * wc;
          float* to = packed;
          for (int64_t b = 0; b < padded_channels; b += block) {
            const int64_t size = min_of(block, padded_channels - b);
            for (int64_t t = 0; t < T; ++t) {
              for (int64_t k = b; k < b + size; ++k) {
                *to++ = k < out_per_group ? from[k * wo + t / kw * wh + t % kw * ww] : 0.0f;
              }
            }
          }
        }
        const float* in = delta + (p * N + n) * H * W;
        if (pad_h == 0 && pad_w == 0) {
          // no padding: read the plane in place
        } else {
          for (int64_t h = 0; h < H; ++h) copy(in + h * W, plane + (h + pad_h) * Wp + pad_w, W);
          in = plane;
        }
        Out* to = out + (p * N + n) * Ho * Wo * O;
        if (out_per_group < O) __builtin_memset(to, 0, static_cast<size_t>(Ho * Wo * O) * sizeof(Out));
        to += first;
        for (int64_t b = 0; b < padded_channels; b += block) {
          if (padded_channels - b >= block) {
            tiles<pixels(2), 2>(taps, in, packed + b * T, to + b, out_per_group - b, Wo, Ho);
          } else {
            tiles<pixels(1), 1>(taps, in, packed + b * T, to + b, out_per_group - b, Wo, Ho);
          }
        }
      }
    }
  }
}

}  // namespace

DZ_KERNEL(channel_conv2d,
          (const float* delta,      // [P, N, H, W]
           const int64_t* channel,  // [P] input channel
           const float* weight,     // [O, in_per_group, kh, kw] with strides wo, wc, wh, ww
           void* out,               // [P, N, Ho, Wo, O] float32, or bfloat16 with half
           int64_t P, int64_t N, int64_t H, int64_t W, int64_t Ho, int64_t Wo, int64_t O, int64_t kh, int64_t kw,
           int64_t wo, int64_t wc, int64_t wh, int64_t ww, int64_t stride_h, int64_t stride_w, int64_t pad_h,
           int64_t pad_w, int64_t dil_h, int64_t dil_w, int64_t in_per_group, int64_t out_per_group, bool half)) {
  const auto run = [&](auto* to) {
    convolve(delta, channel, weight, to, P, N, H, W, Ho, Wo, O, kh, kw, wo, wc, wh, ww, stride_h, stride_w, pad_h,
             pad_w, dil_h, dil_w, in_per_group, out_per_group);
  };
  if (half) {
    run(static_cast<Bf16*>(out));
  } else {
    run(static_cast<float*>(out));
  }
}

}  // namespace dz
