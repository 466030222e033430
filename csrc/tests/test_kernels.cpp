// Drives every CPU kernel at every instruction set level of this machine, and every CUDA kernel as plain C++, against
// straightforward loops. Built with the address and undefined-behaviour sanitizers by .ci/run: buffers have exactly the
// size that the contract gives them, so one element too many is an error.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/dispatch.h"
#include "cuda/channel_batch_norm.cuh"
#include "cuda/channel_conv2d.cuh"
#include "cuda/conv2d_tap.cuh"
#include "cuda/cross_entropy_difference.cuh"
#include "cuda/dense_conv2d.cuh"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Indices = std::vector<int64_t>;

int checks = 0;

// Fails on NaN as well.
template <typename T>
void compare(const std::string& what, const std::vector<T>& got, const std::vector<T>& wanted, double tolerance) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(got[i]) - static_cast<double>(wanted[i]));
    if (!(difference <= tolerance * (1 + std::fabs(static_cast<double>(wanted[i]))))) {
      std::fprintf(stderr, "%s: element %zu is %.9g, wanted %.9g\n", what.c_str(), i, static_cast<double>(got[i]),
                   static_cast<double>(wanted[i]));
      std::exit(1);
    }
  }
  ++checks;
}

template <typename T>
dz::Word word_of(char code, T value) {
  dz::Word word;
  if constexpr (std::is_arithmetic_v<T>) {
    if (code == 'p') throw std::invalid_argument("a number where a kernel takes a pointer");
    if (code == 'd') {
      word.real = static_cast<double>(value);
    } else {
      word.integer = static_cast<int64_t>(value);
    }
  } else {
    if (code != 'p') throw std::invalid_argument("a pointer where a kernel takes a number");
    word.address = value;
  }
  return word;
}

// A kernel by its name, at the level in use.
template <typename... Args>
void run_kernel(const char* name, Args... args) {
  const dz::Kernel& kernel = dz::at_level_in_use(dz::kernel_levels(name));
  if (std::strlen(kernel.codes) != sizeof...(args)) throw std::invalid_argument("a wrong number of arguments");
  const char* code = kernel.codes;
  const dz::Word words[] = {word_of(*code++, args)...};
  kernel.call(words);
}

std::mt19937 random_bits(1);

int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

// How a CUDA kernel runs on the host.
unsigned any_threads() { return 1u << draw(0, 6); }
bool any_order() { return draw(0, 1) == 1; }

Floats small_ints(int64_t size) {
  Floats values(static_cast<size_t>(size));
  for (float& v : values) v = static_cast<float>(draw(-4, 4));
  return values;
}

Floats normals(int64_t size, float scale) {
  std::normal_distribution<float> normal;
  Floats values(static_cast<size_t>(size));
  for (float& v : values) v = scale * normal(random_bits);
  return values;
}

Floats poisoned(int64_t size) { return Floats(static_cast<size_t>(size), NAN); }

uint16_t to_half(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_half(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// A tensor that may be bfloat16, in memory of just its size.
struct Halves {
  explicit Halves(const Floats& values) {
    for (const float v : values) bits.push_back(to_half(v));
  }
  Floats floats() const {
    Floats values;
    for (const uint16_t v : bits) values.push_back(from_half(v));
    return values;
  }
  std::vector<uint16_t> bits;
};

// run(delta, half, out, out_half) with both types of both. All results are those in float32, rounded once to bfloat16
// where they are that; `wanted` belongs to a delta that bfloat16 holds.
template <typename Run>
void compare_types(const std::string& what, const Floats& delta, const Floats& wanted, double tolerance, Run run) {
  const Halves narrow(delta);
  Floats plain = poisoned(static_cast<int64_t>(wanted.size()));
  run(static_cast<const void*>(delta.data()), false, static_cast<void*>(plain.data()), false);
  compare(what, plain, wanted, tolerance);
  for (const bool half : {false, true}) {
    const void* from = half ? static_cast<const void*>(narrow.bits.data()) : delta.data();
    Floats out = poisoned(static_cast<int64_t>(wanted.size()));
    run(from, half, static_cast<void*>(out.data()), false);
    compare(what + ", from either type", out, plain, 0);
    Halves rounded(poisoned(static_cast<int64_t>(wanted.size())));
    run(from, half, static_cast<void*>(rounded.bits.data()), true);
    compare(what + ", to bfloat16", rounded.floats(), Halves(plain).floats(), 0);
  }
}

struct Geometry {
  int64_t P, N, H, W, O, C, groups, kh, kw, sh, sw, ph, pw, dh, dw, Ho, Wo;
};

Geometry any_geometry() {
  for (;;) {
    Geometry g{};
    g.P = draw(0, 4), g.N = draw(1, 3), g.H = draw(1, 9), g.W = draw(1, 20), g.groups = draw(1, 3);
    g.O = g.groups * draw(1, 40), g.C = g.groups * draw(1, 3);
    g.kh = draw(1, 4), g.kw = draw(1, 4), g.sh = draw(1, 3), g.sw = draw(1, 3);
    g.ph = draw(0, 3), g.pw = draw(0, 3), g.dh = draw(1, 3), g.dw = draw(1, 3);
    const int64_t free_h = g.H + 2 * g.ph - g.dh * (g.kh - 1) - 1, free_w = g.W + 2 * g.pw - g.dw * (g.kw - 1) - 1;
    if (free_h < 0 || free_w < 0) continue;
    g.Ho = free_h / g.sh + 1, g.Wo = free_w / g.sw + 1;
    return g;
  }
}

// Contiguous and channels-last strides of [N, C, H, W].
struct Strides {
  int64_t n, c, h, w;
};

Strides strides(int64_t C, int64_t H, int64_t W, bool channels_last) {
  return channels_last ? Strides{C * H * W, 1, W * C, C} : Strides{C * H * W, H * W, W, 1};
}

void test_conv2d_tap(const Geometry& g, bool channels_last) {
  const int64_t Cg = g.C / g.groups, Og = g.O / g.groups;
  const Strides s = strides(g.C, g.H, g.W, channels_last);
  const Floats x = small_ints(g.N * g.C * g.H * g.W), step = small_ints(g.P);
  Indices coord;
  for (int64_t p = 0; p < g.P; ++p) {
    for (const int64_t size : {g.O, Cg, g.kh, g.kw}) coord.push_back(draw(0, size - 1));
  }
  Floats wanted;
  for (int64_t p = 0; p < g.P; ++p) {
    const int64_t* at = coord.data() + 4 * p;
    for (int64_t n = 0; n < g.N; ++n) {
      for (int64_t u = 0; u < g.Ho; ++u) {
        for (int64_t v = 0; v < g.Wo; ++v) {
          const int64_t h = u * g.sh + at[2] * g.dh - g.ph, w = v * g.sw + at[3] * g.dw - g.pw;
          const bool inside = h >= 0 && h < g.H && w >= 0 && w < g.W;
          const int64_t c = at[0] / Og * Cg + at[1];
          wanted.push_back(inside ? step[p] * x[n * s.n + c * s.c + h * s.h + w * s.w] : 0.0f);
        }
      }
    }
  }
  Floats out = poisoned(static_cast<int64_t>(wanted.size()));
  run_kernel("conv2d_tap", x.data(), coord.data(), step.data(), out.data(), g.P, g.N, g.H, g.W, g.Ho, g.Wo, s.n, s.c,
             s.h, s.w, g.sh, g.sw, g.ph, g.pw, g.dh, g.dw, Cg, Og);
  compare("conv2d_tap " + dz::isa(), out, wanted, 0);
  out = poisoned(static_cast<int64_t>(wanted.size()));
  launch_on_host(dz::conv2d_tap_kernel, static_cast<unsigned>(g.P * g.N), 2, any_threads(), 0, any_order(), x.data(),
                 coord.data(), step.data(), out.data(), g.N, g.H, g.W, g.Ho, g.Wo, s.n, s.c, s.h, s.w, g.sh, g.sw, g.ph,
                 g.pw, g.dh, g.dw, Cg, Og);
  compare("conv2d_tap cuda on host", out, wanted, 0);
}

void test_channel_conv2d(const Geometry& g, bool channels_last) {
  const int64_t Cg = g.C / g.groups, Og = g.O / g.groups;
  const Strides s = strides(Cg, g.kh, g.kw, channels_last);
  const Floats delta = small_ints(g.P * g.N * g.H * g.W), weight = small_ints(g.O * Cg * g.kh * g.kw);
  Indices channel;
  for (int64_t p = 0; p < g.P; ++p) channel.push_back(draw(0, g.C - 1));
  Floats wanted;
  for (int64_t p = 0; p < g.P; ++p) {
    const int64_t group = channel[p] / Cg, c = channel[p] % Cg;
    for (int64_t n = 0; n < g.N; ++n) {
      for (int64_t pixel = 0; pixel < g.Ho * g.Wo; ++pixel) {
        for (int64_t o = 0; o < g.O; ++o) {
          float sum = 0;
          for (int64_t t = 0; t < g.kh * g.kw && o / Og == group; ++t) {
            const int64_t i = t / g.kw, j = t % g.kw;
            const int64_t h = pixel / g.Wo * g.sh + i * g.dh - g.ph, w = pixel % g.Wo * g.sw + j * g.dw - g.pw;
            if (h < 0 || h >= g.H || w < 0 || w >= g.W) continue;
            sum += delta[((p * g.N + n) * g.H + h) * g.W + w] * weight[o * s.n + c * s.c + i * s.h + j * s.w];
          }
          wanted.push_back(sum);
        }
      }
    }
  }
  const int64_t size = static_cast<int64_t>(wanted.size());
  Floats out = poisoned(size);
  run_kernel("channel_conv2d", delta.data(), channel.data(), weight.data(), out.data(), g.P, g.N, g.H, g.W, g.Ho, g.Wo,
             g.O, g.kh, g.kw, s.n, s.c, s.h, s.w, g.sh, g.sw, g.ph, g.pw, g.dh, g.dw, Cg, Og, false);
  compare("channel_conv2d " + dz::isa(), out, wanted, 0);
  std::vector<uint16_t> half(wanted.size());
  run_kernel("channel_conv2d", delta.data(), channel.data(), weight.data(), half.data(), g.P, g.N, g.H, g.W, g.Ho, g.Wo,
             g.O, g.kh, g.kw, s.n, s.c, s.h, s.w, g.sh, g.sw, g.ph, g.pw, g.dh, g.dw, Cg, Og, true);
  Floats rounded;
  for (const float v : wanted) rounded.push_back(from_half(to_half(v)));
  out.clear();
  for (const uint16_t v : half) out.push_back(from_half(v));
  compare("channel_conv2d, bfloat16, " + dz::isa(), out, rounded, 0);
  for (const bool staged : {false, true}) {
    out = poisoned(size);
    launch_on_host(dz::channel_conv2d_kernel, static_cast<unsigned>(g.P * g.N), 3, any_threads(),
                   staged ? static_cast<size_t>(g.kh * g.kw * Og) * sizeof(float) : 0, any_order(), delta.data(),
                   channel.data(), weight.data(), out.data(), g.N, g.H, g.W, g.Ho, g.Wo, g.O, g.kh, g.kw, s.n, s.c, s.h,
                   s.w, g.sh, g.sw, g.ph, g.pw, g.dh, g.dw, Cg, Og, staged);
    compare("channel_conv2d cuda on host", out, wanted, 0);
  }
}

void test_dense_conv2d(int64_t images, int64_t H, int64_t W, int64_t C, int64_t O, int64_t ph, int64_t pw) {
  const int64_t Ho = H + 2 * ph - 2, Wo = W + 2 * pw - 2;
  const Floats delta = normals(images * H * W * C, 1), weight = normals(O * C * 9, 1);
  Floats wanted;
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t pixel = 0; pixel < Ho * Wo; ++pixel) {
      for (int64_t o = 0; o < O; ++o) {
        double sum = 0;
        for (int64_t t = 0; t < 9; ++t) {
          const int64_t h = pixel / Wo + t / 3 - ph, w = pixel % Wo + t % 3 - pw;
          if (h < 0 || h >= H || w < 0 || w >= W) continue;
          for (int64_t c = 0; c < C; ++c) {
            sum += static_cast<double>(delta[((n * H + h) * W + w) * C + c]) * weight[(o * C + c) * 9 + t];
          }
        }
        wanted.push_back(static_cast<float>(sum));
      }
    }
  }
  Floats out = poisoned(static_cast<int64_t>(wanted.size()));
  run_kernel("dense_conv2d", delta.data(), weight.data(), out.data(), images, H, W, C, Ho, Wo, O, ph, pw);
  // Memory is what this looks at: a wrong element is off by about 1. tests/ops has the bound that rounding obeys.
  compare("dense_conv2d " + dz::isa(), out, wanted, 1e-3);
}

constexpr int64_t kShared = 163 * 1024;  // bytes of shared memory that a block of an A100 can have

struct Convolution {
  int64_t images, H, W, C, O, stride_h, stride_w, pad_h, pad_w;
  unsigned blocks = 1;
  int64_t limit = kShared;  // of shared memory
};

// A 3x3 convolution by the CUDA kernel: bit for bit on small integers. Else within one rounding of each sum of k
// products, and of float32 12 more: its second tf32 is short of two bits, an error of 2^-22 of each factor, and the
// product of the second ones is left out.
void test_dense_conv2d_cuda(const Convolution& g, bool half, bool ints) {
  const int64_t images = g.images, H = g.H, W = g.W, C = g.C, O = g.O;
  const int64_t Ho = (H + 2 * g.pad_h - 3) / g.stride_h + 1, Wo = (W + 2 * g.pad_w - 3) / g.stride_w + 1;
  const auto values = [&](int64_t size) {
    const Floats plain = ints ? small_ints(size) : normals(size, 1);
    return half ? Halves(plain).floats() : plain;
  };
  const Floats delta = values(images * H * W * C), weight = values(O * 9 * C);
  Doubles wanted, sizes;
  for (int64_t pixel = 0; pixel < images * Ho * Wo; ++pixel) {
    const int64_t top = pixel / Wo % Ho * g.stride_h - g.pad_h, left = pixel % Wo * g.stride_w - g.pad_w;
    for (int64_t o = 0; o < O; ++o) {
      double sum = 0, size = 0;
      for (int64_t t = 0; t < 9; ++t) {
        const int64_t h = top + t / 3, w = left + t % 3;
        if (h < 0 || h >= H || w < 0 || w >= W) continue;
        for (int64_t c = 0; c < C; ++c) {
          const double term = static_cast<double>(delta[((pixel / Wo / Ho * H + h) * W + w) * C + c]) *
                              static_cast<double>(weight[(o * 9 + t) * C + c]);
          sum += term, size += std::fabs(term);
        }
      }
      wanted.push_back(sum), sizes.push_back(size);
    }
  }
  dz::DenseConv2d s{};
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  s.images = images, s.H = narrow(H), s.W = narrow(W), s.C = narrow(C), s.Ho = narrow(Ho), s.Wo = narrow(Wo);
  s.O = narrow(O), s.stride_h = narrow(g.stride_h), s.stride_w = narrow(g.stride_w);
  s.pad_h = narrow(g.pad_h), s.pad_w = narrow(g.pad_w);
  const Halves narrow_delta(delta), narrow_weight(weight);
  Floats out = poisoned(static_cast<int64_t>(wanted.size()));
  Halves rounded(out);
  const bool planned = dz::with_block(s, half, g.limit, [&](auto block) {
    using Block = decltype(block);
    const auto run = [&](const auto* from, const auto* with, auto* to) {
      launch_on_host(dz::dense_conv2d_kernel<Block>, g.blocks, static_cast<unsigned>(O / Block::kOuts), Block::kThreads,
                     static_cast<size_t>(s.shared), any_order(), from, with, to, s);
    };
    if constexpr (sizeof(typename Block::Type) == 2) {
      run(narrow_delta.bits.data(), narrow_weight.bits.data(), rounded.bits.data());
    } else {
      run(delta.data(), weight.data(), out.data());
    }
  });
  if (!planned) {
    std::fprintf(stderr, "dense_conv2d cuda: no plan for %lld bytes\n", static_cast<long long>(g.limit));
    std::exit(1);
  }
  if (half) out = rounded.floats();
  const double unit = std::ldexp(1.0, -24),
               products = half ? 9.0 * static_cast<double>(C) / 16 : 27.0 * static_cast<double>(C) / 8;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const float exact = static_cast<float>(wanted[i]);
    const double last = half && !ints ? std::ldexp(1.0, -8) * std::fabs(wanted[i]) : 0;
    const double bound = ints ? 0 : (products + (half ? 0 : 12)) * unit * sizes[i] + last;
    const double goal = ints ? (half ? from_half(to_half(exact)) : exact) : wanted[i];
    if (!(std::fabs(static_cast<double>(out[i]) - goal) <= bound)) {
      std::fprintf(stderr,
                   "dense_conv2d cuda on host, %lld x [%lld, %lld, %lld] to %lld: element %zu is %.9g, wanted %.9g\n",
                   static_cast<long long>(images), static_cast<long long>(H), static_cast<long long>(W),
                   static_cast<long long>(C), static_cast<long long>(O), i, static_cast<double>(out[i]), goal);
      std::exit(1);
    }
  }
  ++checks;
}

// Every kernel, and every way to lay tiles.
void test_dense_conv2d_cuda() {
  for (const bool half : {true, false}) {
    for (const int64_t C : {16, 32, 64}) {
      for (const int64_t O : {16, 32, 64}) {
        for (const int64_t stride : {1, 2}) {
          test_dense_conv2d_cuda({draw(1, 2), 5, 7, C, O, stride, stride, 1, 1}, half, true);
        }
        test_dense_conv2d_cuda({1, 4, 5, C, O, 1, 1, 1, 1}, half, false);
      }
    }
    int64_t& conflicts = cuda_on_host::warp::conflicts;
    conflicts = 0;
    for (const Convolution& g : {
             Convolution{9, 8, 8, 64, 64, 1, 1, 1, 1, 2},    // a block of several tiles, the last one not full
             Convolution{1, 32, 32, 16, 16, 1, 1, 1, 1, 3},  // an image of several tiles
             Convolution{2, 32, 32, 16, 32, 2, 2, 1, 1},
             Convolution{2, 16, 16, 32, 64, 2, 2, 1, 1},
         }) {
      test_dense_conv2d_cuda(g, half, true);
    }
    if (conflicts != 0) {
      std::fprintf(stderr, "dense_conv2d cuda: %lld conflicts of banks\n", static_cast<long long>(conflicts));
      std::exit(1);
    }
    for (const Convolution& g : {
             Convolution{2, 9, 71, 16, 48, 1, 1, 1, 1, 2},  // tiles side by side, three blocks of outputs
             Convolution{2, 7, 6, 96, 16, 1, 2, 0, 2},      // three slices, or six
             Convolution{3, 4, 3, 48, 128, 2, 1, 2, 0},
             Convolution{70, 1, 1, 16, 16, 2, 2, 1, 1, 2, 120 * 1024},           // room for fewer images a tile
             Convolution{2, 6, 9, 32, 32, 1, 1, 1, 1, 1, half ? 14000 : 23500},  // for fewer rows, and columns
         }) {
      test_dense_conv2d_cuda(g, half, true);
    }
  }
  // What dzkernels/cuda/dense_conv2d.py lets through runs on every GPU: some have 99 KiB only.
  dz::DenseConv2d s{};
  s.images = 1, s.H = s.W = s.Ho = s.Wo = 8, s.stride_h = s.stride_w = 2, s.pad_h = s.pad_w = 1;
  const auto runs = [&](bool half, int C, int O, int64_t limit) {
    s.C = C, s.O = O;
    return dz::with_block(s, half, limit, [](auto) {});
  };
  for (const bool half : {true, false}) {
    if (!runs(half, half ? 256 : 128, 64, 99 * 1024) || runs(half, 64, 64, 16 * 1024) || runs(half, 24, 16, kShared) ||
        runs(half, 16, 24, kShared)) {
      std::fprintf(stderr, "dense_conv2d cuda: a wrong choice of blocks\n");
      std::exit(1);
    }
  }
}

void test_channel_batch_norm(int64_t P, int64_t N, int64_t C, int64_t H, int64_t W, float scale, bool channels_last,
                             bool relu) {
  const int64_t M = N * H * W;
  const double eps = 1e-5;
  const Strides s = strides(C, H, W, channels_last);
  const Floats x = normals(N * C * H * W, 1), delta = normals(P * M, scale);
  Floats y(x.size());
  const auto at = [&](int64_t c, int64_t m) {
    return static_cast<size_t>(m / (H * W) * s.n + c * s.c + m / W % H * s.h + m % W * s.w);
  };
  Doubles mean(static_cast<size_t>(C)), var(static_cast<size_t>(C)), gamma;
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t m = 0; m < M; ++m) mean[c] += x[at(c, m)] / static_cast<double>(M);
    for (int64_t m = 0; m < M; ++m) var[c] += std::pow(x[at(c, m)] - mean[c], 2) / static_cast<double>(M);
    gamma.push_back(0.5 + static_cast<double>(c));
    for (int64_t m = 0; m < M; ++m) {
      y[at(c, m)] = static_cast<float>(gamma[c] * (x[at(c, m)] - mean[c]) / std::sqrt(var[c] + eps) + 0.25);
    }
  }
  Indices channel;
  Floats wanted, wanted_running;
  for (int64_t p = 0; p < P; ++p) {
    const int64_t c = draw(0, C - 1);
    channel.push_back(c);
    double moved_mean = 0, moved_var = 0;
    for (int64_t m = 0; m < M; ++m)
      moved_mean += (x[at(c, m)] + static_cast<double>(delta[p * M + m])) / static_cast<double>(M);
    for (int64_t m = 0; m < M; ++m) {
      moved_var +=
          std::pow(x[at(c, m)] + static_cast<double>(delta[p * M + m]) - moved_mean, 2) / static_cast<double>(M);
    }
    for (int64_t m = 0; m < M; ++m) {
      const double base = gamma[c] * (x[at(c, m)] - mean[c]) / std::sqrt(var[c] + eps);
      const double moved = x[at(c, m)] + static_cast<double>(delta[p * M + m]) - moved_mean;
      const double dy = gamma[c] * moved / std::sqrt(moved_var + eps) - base;
      const double from = y[at(c, m)];
      wanted.push_back(static_cast<float>(relu ? std::fmax(from + dy, 0) - std::fmax(from, 0) : dy));
    }
  }
  const float* base_output = relu ? y.data() : nullptr;
  Floats out = poisoned(P * M);
  run_kernel("channel_batch_norm", delta.data(), channel.data(), x.data(), mean.data(), var.data(), gamma.data(),
             base_output, nullptr, out.data(), eps, P, N, H, W, s.n, s.c, s.h, s.w, s.n, s.c, s.h, s.w, 0, 0, 0, 0, 1,
             true);
  compare("channel_batch_norm " + dz::isa(), out, wanted, 2e-5);
  for (int64_t pool = 2; pool <= 3 && pool <= lesser(H, W); ++pool) {
    const Floats gap = normals(N * C * H * W, 1);
    Floats tops;
    for (int64_t o = 0; o < P * N * (H / pool) * (W / pool); ++o) {
      const int64_t v = o % (W / pool), u = o / (W / pool) % (H / pool), n = o / (W / pool) / (H / pool) % N;
      const int64_t p = o / (W / pool) / (H / pool) / N, c = channel[p];
      float top = -HUGE_VALF;
      for (int64_t k = 0; k < pool * pool; ++k) {
        const int64_t m = (n * H + u * pool + k / pool) * W + v * pool + k % pool;
        top = std::fmax(top, wanted[p * M + m] + gap[at(c, m)]);
      }
      tops.push_back(top);
    }
    out = poisoned(static_cast<int64_t>(tops.size()));
    run_kernel("channel_batch_norm", delta.data(), channel.data(), x.data(), mean.data(), var.data(), gamma.data(),
               base_output, gap.data(), out.data(), eps, P, N, H, W, s.n, s.c, s.h, s.w, s.n, s.c, s.h, s.w, s.n, s.c,
               s.h, s.w, pool, true);
    compare("channel_batch_norm, pooled, " + dz::isa(), out, tops, 2e-5);
  }
  for (int64_t p = 0; p < P && !relu; ++p) {
    for (int64_t m = 0; m < M; ++m) {
      const int64_t c = channel[p];
      wanted_running.push_back(static_cast<float>(gamma[c] / std::sqrt(var[c] + eps) * delta[p * M + m]));
    }
  }
  if (!relu) {
    out = poisoned(P * M);
    run_kernel("channel_batch_norm", delta.data(), channel.data(), x.data(), mean.data(), var.data(), gamma.data(),
               nullptr, nullptr, out.data(), eps, P, N, H, W, s.n, s.c, s.h, s.w, 0, 0, 0, 0, 0, 0, 0, 0, 1, false);
    compare("channel_batch_norm, running statistics, " + dz::isa(), out, wanted_running, 1e-6);
  }
  out = poisoned(P * M);
  const unsigned threads = any_threads();
  launch_on_host(dz::channel_batch_norm_kernel, static_cast<unsigned>(P), 1, threads, threads * sizeof(double),
                 any_order(), delta.data(), channel.data(), x.data(), mean.data(), var.data(), gamma.data(),
                 base_output, out.data(), eps, N, H, W, s.n, s.c, s.h, s.w, s.n, s.c, s.h, s.w);
  compare("channel_batch_norm cuda on host", out, wanted, 4e-6);
}

// `kind` of residual: 0 none, 1 dense, 2 dense bfloat16, 3 one channel.
void test_dense_batch_norm(int64_t P, int64_t N, int64_t C, int64_t H, int64_t W, int64_t pool, int kind, bool training,
                           bool relu, bool half) {
  const int64_t M = N * H * W, E = M * C, Ho = H / pool, Wo = W / pool;
  const double eps = 1e-5;
  Floats zc = normals(E, 1), delta = normals(P * E, 0.5f), residual = normals(P * (kind == 3 ? M : E), 0.5f);
  const Floats y = normals(E, 1);
  Doubles var(static_cast<size_t>(C)), gamma;
  Indices channel;
  for (int64_t p = 0; p < P; ++p) channel.push_back(draw(0, C - 1));
  for (int64_t c = 0; c < C; ++c) {
    double mean = 0;
    for (int64_t m = 0; m < M; ++m) mean += zc[m * C + c] / static_cast<double>(M);
    for (int64_t m = 0; m < M; ++m) zc[m * C + c] = static_cast<float>(zc[m * C + c] - mean);
    for (int64_t m = 0; m < M; ++m) var[c] += std::pow(zc[m * C + c], 2) / static_cast<double>(M);
    gamma.push_back(0.5 + static_cast<double>(c % 3));
  }
  std::vector<uint16_t> delta_half, residual_half;
  if (half) {
    for (float& v : delta) delta_half.push_back(to_half(v)), v = from_half(delta_half.back());
  }
  if (kind == 2) {
    for (float& v : residual) residual_half.push_back(to_half(v)), v = from_half(residual_half.back());
  }
  Floats gap(static_cast<size_t>(E)), moved(static_cast<size_t>(P * E)), wanted;
  const auto base = [&](int64_t i) { return relu ? std::fmax(y[i], 0.0f) : y[i]; };
  for (int64_t i = 0; i < E; ++i) {
    const int64_t c = i % C, w = i / C % W, h = i / C / W % H, n = i / C / W / H;
    float top = base(i);
    for (int64_t a = h / pool * pool; a < lesser(H, (h / pool + 1) * pool); ++a) {
      for (int64_t b = w / pool * pool; b < lesser(W, (w / pool + 1) * pool); ++b) {
        top = std::fmax(top, base(((n * H + a) * W + b) * C + c));
      }
    }
    gap[i] = base(i) - top;
  }
  for (int64_t p = 0; p < P; ++p) {
    for (int64_t c = 0; c < C; ++c) {
      double mean = 0, after = 0;
      for (int64_t m = 0; m < M && training; ++m) mean += delta[p * E + m * C + c] / static_cast<double>(M);
      const auto at = [&](int64_t m) { return zc[m * C + c] + (delta[p * E + m * C + c] - mean); };
      for (int64_t m = 0; m < M; ++m) after += std::pow(at(m), 2) / static_cast<double>(M);
      for (int64_t m = 0; m < M; ++m) {
        const int64_t i = m * C + c;
        const double s = std::sqrt(var[c] + eps);
        double change = gamma[c] * (training ? at(m) / std::sqrt(after + eps) - zc[i] / s : delta[p * E + i] / s);
        if (kind == 1 || kind == 2) change += residual[p * E + i];
        if (kind == 3 && channel[p] == c) change += residual[p * M + m];
        moved[p * E + i] =
            static_cast<float>(relu ? std::fmax(y[i] + change, 0) - std::fmax(static_cast<double>(y[i]), 0) : change);
      }
    }
    for (int64_t o = 0; o < N * Ho * Wo * C; ++o) {
      const int64_t c = o % C, v = o / C % Wo, u = o / C / Wo % Ho, n = o / C / Wo / Ho;
      float top = -HUGE_VALF;
      for (int64_t k = 0; k < pool * pool; ++k) {
        const int64_t i = ((n * H + u * pool + k / pool) * W + v * pool + k % pool) * C + c;
        top = std::fmax(top, pool > 1 ? gap[i] + moved[p * E + i] : moved[p * E + i]);
      }
      wanted.push_back(top);
    }
  }
  std::vector<uint16_t> out_half(half ? wanted.size() : 0);
  Floats out = poisoned(half ? 0 : static_cast<int64_t>(wanted.size()));
  const void* from = half ? static_cast<const void*>(delta_half.data()) : delta.data();
  const void* with = kind == 2 ? static_cast<const void*>(residual_half.data()) : residual.data();
  run_kernel("dense_batch_norm", from, zc.data(), var.data(), gamma.data(), kind == 0 ? nullptr : with,
             kind == 3 ? channel.data() : nullptr, relu ? y.data() : nullptr, pool > 1 ? gap.data() : nullptr,
             half ? static_cast<void*>(out_half.data()) : out.data(), eps, P, N, H, W, C, pool, training, half,
             kind == 2, half);
  for (const uint16_t v : out_half) out.push_back(from_half(v));
  compare("dense_batch_norm " + dz::isa(), out, wanted, half ? 8e-3 : 2e-5);
}

// A norm, ReLU and max pooling after a convolution, channel by channel.
struct After {
  After(const Geometry& g, bool training_, bool relu_, int64_t pool_)
      : N(g.N), H(g.Ho), W(g.Wo), pool(pool_), training(training_), relu(relu_ || pool_ > 1) {
    zc = normals(g.O * M(), 1);
    for (int64_t o = 0; o < g.O; ++o) {
      double mean = 0, square = 0;
      for (int64_t m = 0; m < M(); ++m) mean += zc[o * M() + m] / static_cast<double>(M());
      for (int64_t m = 0; m < M(); ++m) zc[o * M() + m] = static_cast<float>(zc[o * M() + m] - mean);
      for (int64_t m = 0; m < M(); ++m) square += std::pow(zc[o * M() + m], 2) / static_cast<double>(M());
      var.push_back(square);
      gamma.push_back(0.5 + static_cast<double>(o % 3));
      beta.push_back(0.1 * static_cast<double>(o % 4));
    }
  }
  int64_t M() const { return N * H * W; }

  // What the difference d [N, H, W] of channel o becomes, [N, H / pool, W / pool].
  Doubles changed(const Doubles& d, int64_t o) const {
    double mean = 0, after = 0;
    for (int64_t m = 0; m < M() && training; ++m) mean += d[m] / static_cast<double>(M());
    const auto at = [&](int64_t m) { return zc[o * M() + m] + (d[m] - mean); };
    for (int64_t m = 0; m < M(); ++m) after += std::pow(at(m), 2) / static_cast<double>(M());
    const double s = std::sqrt(var[o] + eps);
    Doubles out;
    for (int64_t q = 0; q < N * (H / pool) * (W / pool); ++q) {
      const int64_t v = q % (W / pool), u = q / (W / pool) % (H / pool), n = q / (W / pool) / (H / pool);
      double top = relu ? 0 : -HUGE_VAL, base = top;
      for (int64_t k = 0; k < pool * pool; ++k) {
        const int64_t m = (n * H + u * pool + k / pool) * W + v * pool + k % pool;
        const double y = gamma[o] * zc[o * M() + m] / s + beta[o];
        const double change = gamma[o] * (training ? at(m) / std::sqrt(after + eps) - zc[o * M() + m] / s : d[m] / s);
        top = std::fmax(top, y + change), base = std::fmax(base, y);
      }
      out.push_back(top - base);
    }
    return out;
  }

  int64_t N, H, W, pool;
  bool training, relu;
  double eps = 1e-5;
  Floats zc;  // [O, N, H, W]
  Doubles var, gamma, beta;
};

void test_conv2d_tap_batch_norm(const Geometry& g, bool training, bool relu, int64_t pool) {
  const After after(g, training, relu, pool);
  const int64_t Cg = g.C / g.groups, Og = g.O / g.groups;
  const Floats x = normals(g.C * g.N * g.H * g.W, 1), step = normals(g.P, 0.3f);
  Indices coord;
  Floats wanted;
  for (int64_t p = 0; p < g.P; ++p) {
    const int64_t o = draw(0, g.O - 1), c = draw(0, Cg - 1), i = draw(0, g.kh - 1), j = draw(0, g.kw - 1);
    coord.insert(coord.end(), {o, c, i, j});
    Doubles d;
    for (int64_t m = 0; m < after.M(); ++m) {
      const int64_t h = m / g.Wo % g.Ho * g.sh + i * g.dh - g.ph, w = m % g.Wo * g.sw + j * g.dw - g.pw;
      const bool inside = h >= 0 && h < g.H && w >= 0 && w < g.W;
      const int64_t n = m / g.Wo / g.Ho;
      d.push_back(inside ? static_cast<double>(step[p]) * x[(((o / Og * Cg + c) * g.N + n) * g.H + h) * g.W + w] : 0.0);
    }
    for (const double v : after.changed(d, o)) wanted.push_back(static_cast<float>(v));
  }
  Floats out = poisoned(static_cast<int64_t>(wanted.size()));
  run_kernel("conv2d_tap_batch_norm", x.data(), coord.data(), step.data(), after.zc.data(), after.var.data(),
             after.gamma.data(), after.beta.data(), out.data(), after.eps, g.P, g.N, g.H, g.W, g.Ho, g.Wo, g.sh, g.sw,
             g.ph, g.pw, g.dh, g.dw, Cg, Og, pool, training, after.relu);
  compare("conv2d_tap_batch_norm " + dz::isa(), out, wanted, 2e-5);
}

void test_channel_conv2d_batch_norm(const Geometry& g, bool training, bool relu, int64_t pool, bool mean) {
  const After after(g, training, relu, pool);
  const int64_t T = g.kh * g.kw, pixels = (g.Ho / pool) * (g.Wo / pool);
  const Floats delta = normals(g.P * g.N * g.H * g.W, 0.3f), weight = normals(g.O * g.C * T, 0.5f);
  Indices channel;
  Floats wanted(static_cast<size_t>(g.P * g.N * (mean ? 1 : pixels) * g.O));
  for (int64_t p = 0; p < g.P; ++p) {
    channel.push_back(draw(0, g.C - 1));
    for (int64_t o = 0; o < g.O; ++o) {
      Doubles d;
      for (int64_t m = 0; m < after.M(); ++m) {
        double sum = 0;
        for (int64_t t = 0; t < T; ++t) {
          const int64_t h = m / g.Wo % g.Ho * g.sh + t / g.kw * g.dh - g.ph;
          const int64_t w = m % g.Wo * g.sw + t % g.kw * g.dw - g.pw, n = m / g.Wo / g.Ho;
          if (h < 0 || h >= g.H || w < 0 || w >= g.W) continue;
          sum +=
              static_cast<double>(delta[((p * g.N + n) * g.H + h) * g.W + w]) * weight[(o * g.C + channel[p]) * T + t];
        }
        d.push_back(sum);
      }
      const Doubles out = after.changed(d, o);
      for (int64_t q = 0; q < g.N * pixels; ++q) {
        float& to = wanted[static_cast<size_t>(
            (p * g.N * (mean ? 1 : pixels) + (mean ? q / pixels : q % (g.N * pixels))) * g.O + o)];
        to += static_cast<float>(mean ? out[q] / static_cast<double>(pixels) : out[q]);
      }
    }
  }
  const auto run = [&](void* out, bool half) {
    run_kernel("channel_conv2d_batch_norm", delta.data(), channel.data(), weight.data(), after.zc.data(),
               after.var.data(), after.gamma.data(), after.beta.data(), out, after.eps, g.P, g.N, g.H, g.W, g.Ho, g.Wo,
               g.C, g.O, g.kh, g.kw, g.sh, g.sw, g.ph, g.pw, g.dh, g.dw, pool, training, after.relu, mean, half);
  };
  Floats out = poisoned(static_cast<int64_t>(wanted.size()));
  run(out.data(), false);
  compare("channel_conv2d_batch_norm " + dz::isa(), out, wanted, 5e-5);
  Halves rounded(poisoned(static_cast<int64_t>(wanted.size())));
  run(rounded.bits.data(), true);
  compare("channel_conv2d_batch_norm, bfloat16, " + dz::isa(), rounded.floats(), Halves(out).floats(), 0);
}

void test_cross_entropy_difference(int64_t P, int64_t N, int64_t K, float scale) {
  const Floats logits = normals(N * K, 2), dlogits = normals(P * N * K, scale);
  Doubles log_probs, probs;
  Indices target;
  const auto log_sum = [K](const auto& value) {
    double top = -HUGE_VAL, sum = 0;
    for (int64_t k = 0; k < K; ++k) top = std::fmax(top, value(k));
    for (int64_t k = 0; k < K; ++k) sum += std::exp(value(k) - top);
    return top + std::log(sum);
  };
  for (int64_t n = 0; n < N; ++n) {
    const double total = log_sum([&](int64_t k) { return static_cast<double>(logits[n * K + k]); });
    for (int64_t k = 0; k < K; ++k)
      log_probs.push_back(logits[n * K + k] - total), probs.push_back(std::exp(log_probs.back()));
    target.push_back(draw(0, K - 1));
  }
  Doubles wanted;
  for (int64_t p = 0; p < P; ++p) {
    double total = 0;
    for (int64_t n = 0; n < N; ++n) {
      const float* d = dlogits.data() + (p * N + n) * K;
      total += log_sum([&](int64_t k) { return log_probs[n * K + k] + d[k]; }) - d[target[n]];
    }
    wanted.push_back(total / static_cast<double>(N));
  }
  Doubles out(static_cast<size_t>(P), NAN);
  run_kernel("cross_entropy_difference", log_probs.data(), probs.data(), target.data(), dlogits.data(), out.data(), P,
             N, K);
  compare("cross_entropy_difference " + dz::isa(), out, wanted, 1e-13);
  // The same logits from one feature per perturbation: dlogits[p, n, k] = delta[p, n] weight[k, channel[p]].
  const Floats delta = normals(P * N, scale), weight = normals(K * 2, 1);
  Floats products;
  Indices channel;
  for (int64_t p = 0; p < P; ++p) {
    channel.push_back(draw(0, 1));
    for (int64_t i = 0; i < N * K; ++i) products.push_back(delta[p * N + i / K] * weight[i % K * 2 + channel[p]]);
  }
  Doubles stored(static_cast<size_t>(P), NAN), direct(static_cast<size_t>(P), NAN);
  run_kernel("cross_entropy_difference", log_probs.data(), probs.data(), target.data(), products.data(), stored.data(),
             P, N, K);
  run_kernel("channel_linear_cross_entropy", delta.data(), channel.data(), weight.data(), log_probs.data(),
             probs.data(), target.data(), direct.data(), P, N, K, 2, 1);
  compare("channel_linear_cross_entropy " + dz::isa(), direct, stored, 1e-5);
  out = Doubles(static_cast<size_t>(P), NAN);
  const unsigned threads = any_threads();
  launch_on_host(dz::cross_entropy_difference_kernel, static_cast<unsigned>(P), 1, threads, threads * sizeof(double),
                 any_order(), log_probs.data(), probs.data(), target.data(), dlogits.data(), out.data(), N, K);
  compare("cross_entropy_difference cuda on host", out, wanted, 1e-13);
}

void test_gelu_difference(int64_t P, int64_t S, float scale, bool tanh) {
  const Floats z = normals(S, 3), delta = Halves(normals(P * S, scale)).floats();
  const auto gelu = [tanh](double x) {
    return tanh ? x / (1 + std::exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
                : x * 0.5 * std::erfc(-x / std::sqrt(2.0));
  };
  Floats wanted;
  for (int64_t i = 0; i < P * S; ++i)
    wanted.push_back(static_cast<float>(gelu(z[i % S] + static_cast<double>(delta[i])) - gelu(z[i % S])));
  compare_types("gelu_difference " + dz::isa(), delta, wanted, 4e-7 * std::fmax(1, scale),
                [&](const void* from, bool half, void* out, bool out_half) {
                  run_kernel("gelu_difference", from, z.data(), out, P, S, tanh, half, out_half);
                });
}

void test_mlp_difference(int64_t P, int64_t R, int64_t K, int64_t H, int64_t M, float scale, bool tanh, bool added,
                         bool normed) {
  const Floats delta = Halves(normals(P * R * K, scale)).floats(), z = normals(R * H, 2);
  const Floats up = Halves(normals(H * K, 0.3f)).floats(), down = Halves(normals(M * H, 0.3f)).floats();
  const Floats residual = Halves(normals(P * R * M, scale)).floats();
  const Halves narrow(delta), more(residual);
  const auto gelu = [tanh](double x) {
    return tanh ? x / (1 + std::exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
                : x * 0.5 * std::erfc(-x / std::sqrt(2.0));
  };
  const Floats zc = normals(R * K, 1), gamma = normals(K, 1);
  const Doubles var(static_cast<size_t>(R), 1.0);
  Floats in = delta, wanted;
  if (normed) {
    run_kernel("layer_norm_difference", delta.data(), zc.data(), var.data(), gamma.data(), in.data(), 1e-3, P, R, K,
               true, false, false);
  }
  for (int64_t row = 0; row < P * R; ++row) {
    Doubles change;
    for (int64_t h = 0; h < H; ++h) {
      const double before = z[row % R * H + h];
      double moved = before;
      for (int64_t k = 0; k < K; ++k) moved += static_cast<double>(in[row * K + k]) * up[h * K + k];
      change.push_back(gelu(moved) - gelu(before));
    }
    for (int64_t m = 0; m < M; ++m) {
      double total = added ? residual[row * M + m] : 0.0;
      for (int64_t h = 0; h < H; ++h) total += change[h] * down[m * H + h];
      wanted.push_back(static_cast<float>(total));
    }
  }
  for (const bool half : {false, true}) {
    const void* from = half ? static_cast<const void*>(narrow.bits.data()) : delta.data();
    const double tolerance = half ? 0.02 * scale * std::sqrt(static_cast<double>(K * H)) : 2e-5 * (1 + scale);
    Floats plain = poisoned(static_cast<int64_t>(wanted.size()));
    for (const bool other : {false, true}) {  // the residual in either type
      const void* extra = other ? static_cast<const void*>(more.bits.data()) : residual.data();
      Floats out = poisoned(static_cast<int64_t>(wanted.size()));
      run_kernel("mlp_difference", from, normed ? zc.data() : nullptr, var.data(), gamma.data(), up.data(), z.data(),
                 down.data(), added ? extra : nullptr, out.data(), 1e-3, P, R, K, H, M, tanh, half, other, false, half);
      compare("mlp_difference " + dz::isa(), out, wanted, tolerance);
      plain = out;
    }
    Halves rounded(poisoned(static_cast<int64_t>(wanted.size())));
    run_kernel("mlp_difference", from, normed ? zc.data() : nullptr, var.data(), gamma.data(), up.data(), z.data(),
               down.data(), added ? residual.data() : nullptr, rounded.bits.data(), 1e-3, P, R, K, H, M, tanh, half,
               false, true, half);
    compare("mlp_difference, to bfloat16", rounded.floats(), Halves(plain).floats(), 0);
  }
}

void test_linear_difference(int64_t P, int64_t R, int64_t K, int64_t M, float scale, bool added, bool normed) {
  const Floats delta = Halves(normals(P * R * K, scale)).floats(), weight = Halves(normals(M * K, 0.3f)).floats();
  const Floats residual = Halves(normals(P * R * M, scale)).floats();
  const Floats zc = normals(R * K, 1), gamma = normals(K, 1);
  const Doubles var(static_cast<size_t>(R), 1.0);
  const Halves narrow(delta), more(residual);
  Floats in = delta, wanted;
  if (normed) {
    run_kernel("layer_norm_difference", delta.data(), zc.data(), var.data(), gamma.data(), in.data(), 1e-3, P, R, K,
               true, false, false);
  }
  for (int64_t row = 0; row < P * R; ++row) {
    for (int64_t m = 0; m < M; ++m) {
      double total = added ? residual[row * M + m] : 0.0;
      for (int64_t k = 0; k < K; ++k) total += static_cast<double>(in[row * K + k]) * weight[m * K + k];
      wanted.push_back(static_cast<float>(total));
    }
  }
  for (const bool half : {false, true}) {
    const void* from = half ? static_cast<const void*>(narrow.bits.data()) : delta.data();
    const double tolerance = half ? 0.02 * (1 + scale) * std::sqrt(static_cast<double>(K)) : 2e-5 * (1 + scale);
    const auto run = [&](bool other, void* out, bool out_half) {
      const void* extra = other ? static_cast<const void*>(more.bits.data()) : residual.data();
      run_kernel("linear_difference", from, normed ? zc.data() : nullptr, var.data(), gamma.data(), weight.data(),
                 added ? extra : nullptr, out, 1e-3, P, R, K, M, half, other, out_half, half);
    };
    for (const bool other : {false, true}) {  // the residual in either type
      Floats out = poisoned(static_cast<int64_t>(wanted.size()));
      run(other, out.data(), false);
      compare("linear_difference " + dz::isa(), out, wanted, tolerance);
      Halves rounded(poisoned(static_cast<int64_t>(wanted.size())));
      run(other, rounded.bits.data(), true);
      compare("linear_difference, to bfloat16", rounded.floats(), Halves(out).floats(), 0);
    }
  }
}

void test_layer_norm_difference(int64_t P, int64_t R, int64_t M, float scale, bool centre, bool weighted) {
  const double eps = 1e-3, size = static_cast<double>(M);
  Floats zc = normals(R * M, 1);
  const Floats delta = Halves(normals(P * R * M, scale)).floats(), gamma = normals(M, 1);
  Doubles var;
  for (int64_t r = 0; r < R; ++r) {
    double mean = 0, square = 0;
    for (int64_t k = 0; k < M && centre; ++k) mean += zc[r * M + k] / size;
    for (int64_t k = 0; k < M; ++k) zc[r * M + k] = static_cast<float>(zc[r * M + k] - mean);
    for (int64_t k = 0; k < M; ++k) square += std::pow(zc[r * M + k], 2) / size;
    var.push_back(square);
  }
  Floats wanted;
  for (int64_t row = 0; row < P * R; ++row) {
    const float *d = delta.data() + row * M, *z = zc.data() + row % R * M;
    double mean = 0, after = eps;
    for (int64_t k = 0; k < M && centre; ++k) mean += d[k] / size;
    for (int64_t k = 0; k < M; ++k) after += std::pow(z[k] + (d[k] - mean), 2) / size;
    for (int64_t k = 0; k < M; ++k) {
      const double change = (z[k] + (d[k] - mean)) / std::sqrt(after) - z[k] / std::sqrt(var[row % R] + eps);
      wanted.push_back(static_cast<float>(weighted ? gamma[k] * change : change));
    }
  }
  compare_types("layer_norm_difference " + dz::isa(), delta, wanted, 1e-4,
                [&](const void* from, bool half, void* out, bool out_half) {
                  run_kernel("layer_norm_difference", from, zc.data(), var.data(), weighted ? gamma.data() : nullptr,
                             out, eps, P, R, M, centre, half, out_half);
                });
}

void test_softmax_difference(int64_t P, int64_t R, int64_t K, float scale, bool log) {
  Floats p = normals(R * K, 2);
  const Floats delta = normals(P * R * K, scale);
  for (int64_t r = 0; r < R; ++r) {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      float& v = p[r * K + k];
      v = k > 0 && k % 5 == 0 ? 0.0f : std::exp(v);
      sum += v;
    }
    for (int64_t k = 0; k < K; ++k) p[r * K + k] = static_cast<float>(p[r * K + k] / sum);
  }
  Floats wanted;
  for (int64_t row = 0; row < P * R; ++row) {
    const float *d = delta.data() + row * K, *prob = p.data() + row % R * K;
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += prob[k] * std::exp(static_cast<double>(d[k]));
    for (int64_t k = 0; k < K; ++k) {
      const double change = d[k] - std::log(sum);
      wanted.push_back(static_cast<float>(log ? change : prob[k] * std::expm1(change)));
    }
  }
  Floats out = poisoned(P * R * K);
  run_kernel("softmax_difference", delta.data(), p.data(), out.data(), P, R, K, log);
  compare("softmax_difference " + dz::isa(), out, wanted, 2e-6);
}

void test_attention_difference(int64_t P, int64_t N, int64_t H, int64_t T, int64_t S, int64_t D, int64_t E, int moves) {
  const Floats q = normals(N * H * T * D, 1), k = normals(N * H * S * D, 1), v = normals(N * H * S * E, 1);
  Floats d[3] = {normals(P * N * H * T * D, 0.3f), normals(P * N * H * S * D, 0.3f), normals(P * N * H * S * E, 0.3f)};
  Floats p(static_cast<size_t>(N * H * T * S)), wanted;
  const double scale = 0.5;
  for (int64_t query = 0; query < N * H * T; ++query) {
    const float *at = q.data() + query * D, *key = k.data() + query / T * S * D;
    double sum = 0;
    for (int64_t s = 0; s < S; ++s) {
      double score = 0;
      for (int64_t i = 0; i < D; ++i) score += scale * at[i] * key[s * D + i];
      float& prob = p[static_cast<size_t>(query * S + s)];
      prob = s > 0 && s % 5 == 0 ? 0.0f : static_cast<float>(std::exp(score));
      sum += prob;
    }
    for (int64_t s = 0; s < S; ++s) p[static_cast<size_t>(query * S + s)] /= static_cast<float>(sum);
  }
  for (int part = 0; part < 3; ++part) {
    if ((moves >> part & 1) == 0) std::fill(d[part].begin(), d[part].end(), 0.0f);
  }
  for (int64_t row = 0; row < P * N * H * T; ++row) {
    const int64_t query = row % (N * H * T), pair = query / T, moved = row / T;
    const float *dq = d[0].data() + row * D, *dk = d[1].data() + moved * S * D, *dv = d[2].data() + moved * S * E;
    const float *at = q.data() + query * D, *key = k.data() + pair * S * D, *value = v.data() + pair * S * E;
    const float* prob = p.data() + query * S;
    Doubles after(static_cast<size_t>(S));
    double sum = 0;
    for (int64_t s = 0; s < S; ++s) {
      double change = 0;
      for (int64_t i = 0; i < D; ++i) {
        change += scale * (dq[i] * key[s * D + i] + (static_cast<double>(at[i]) + dq[i]) * dk[s * D + i]);
      }
      sum += after[static_cast<size_t>(s)] = prob[s] * std::exp(change);
    }
    for (int64_t e = 0; e < E; ++e) {
      double total = 0;
      for (int64_t s = 0; s < S; ++s) {
        const double now = after[static_cast<size_t>(s)] / sum;
        total += (now - prob[s]) * value[s * E + e] + now * dv[s * E + e];
      }
      wanted.push_back(static_cast<float>(total));
    }
  }
  Indices strides = {N * H * T * D, H * T * D, T * D,         D,         N * H * S * D, H * S * D,
                     S * D,         D,         N * H * S * E, H * S * E, S * E,         E};
  for (int part = 0; part < 3; ++part) {
    for (int axis = 0; axis < 4; ++axis)
      strides.push_back(axis == 0 ? 0 : strides[static_cast<size_t>(4 * part + axis)]);
  }
  for (const bool half : {false, true}) {
    Floats out = poisoned(P * N * T * H * E), sorted(wanted.size());
    std::vector<uint16_t> narrow(half ? out.size() : 0), in[3];
    for (int part = 0; part < 3 && half; ++part) {
      for (const float value : d[part]) in[part].push_back(to_half(value));
    }
    const auto given = [&](int part) -> const void* {
      if ((moves >> part & 1) == 0) return nullptr;
      return half ? static_cast<const void*>(in[part].data()) : d[part].data();
    };
    run_kernel("attention_difference", given(0), given(1), given(2), q.data(), k.data(), v.data(), p.data(),
               half ? static_cast<void*>(narrow.data()) : out.data(), strides.data(), scale, P, N, H, T, S, D, E, half,
               half);
    for (size_t i = 0; i < narrow.size(); ++i) out[i] = from_half(narrow[i]);
    for (size_t i = 0; i < out.size(); ++i) {  // [P, N, T, H, E] to [P, N, H, T, E]
      const int64_t at = static_cast<int64_t>(i), e = at % E, h = at / E % H, t = at / E / H % T, n = at / E / H / T;
      sorted[static_cast<size_t>(((n * H + h) * T + t) * E + e)] = out[i];
    }
    compare("attention_difference " + dz::isa(), sorted, wanted, half ? 0.1 : 1e-4);
  }
}

// Against the ops that it is made of, with which it agrees bit for bit in float32.
void test_self_attention_difference(int64_t P, int64_t N, int64_t H, int64_t T, int64_t D, int64_t E, int64_t K,
                                    int64_t M, bool added, bool normed) {
  const int64_t R = N * T, columns = 2 * D + E;
  const Floats delta = normals(P * R * K, 0.1f), weight = normals(H * columns * K, 0.3f), zc = normals(R * K, 1);
  const Floats q = normals(N * H * T * D, 1), k = normals(N * H * T * D, 1), v = normals(N * H * T * E, 1);
  const Floats gamma = normals(K, 1), project = normals(M * H * E, 0.3f), residual = normals(P * R * M, 0.1f);
  const Floats p(static_cast<size_t>(N * H * T * T), 1.0f / static_cast<float>(T));
  const Doubles var(static_cast<size_t>(R), 1.0);
  const float* centred = normed ? zc.data() : nullptr;
  const float* more = added ? residual.data() : nullptr;
  Floats moved = poisoned(P * R * H * columns), attended = poisoned(P * R * H * E), wanted = poisoned(P * R * M);
  run_kernel("linear_difference", delta.data(), centred, var.data(), gamma.data(), weight.data(), nullptr, moved.data(),
             1e-3, P, R, K, H * columns, false, false, false, false);
  Indices strides;
  for (int part = 0; part < 3; ++part) {
    for (const int64_t stride : {R * H * columns, T * H * columns, columns, H * columns}) strides.push_back(stride);
  }
  for (const int64_t width : {D, D, E}) {
    for (const int64_t stride : {int64_t{0}, H * T * width, T * width, width}) strides.push_back(stride);
  }
  run_kernel("attention_difference", moved.data(), moved.data() + D, moved.data() + 2 * D, q.data(), k.data(), v.data(),
             p.data(), attended.data(), strides.data(), 0.5, P, N, H, T, T, D, E, false, false);
  run_kernel("linear_difference", attended.data(), nullptr, nullptr, nullptr, project.data(), more, wanted.data(), 0.0,
             P, R, H * E, M, false, false, false, false);
  for (const bool narrow : {false, true}) {
    Floats out = poisoned(P * R * M);
    run_kernel("self_attention_difference", delta.data(), centred, var.data(), gamma.data(), weight.data(), q.data(),
               k.data(), v.data(), p.data(), project.data(), more, out.data(), 1e-3, 0.5, P, N, H, T, D, E, K, M, false,
               false, false, narrow);
    compare("self_attention_difference " + dz::isa(), out, wanted,
            narrow ? 0.02 * std::sqrt(static_cast<double>(K * H * E)) : 0);
  }
}

}  // namespace

int main() {
  for (const std::string& level : dz::isa_built()) {
    const std::string refusal = dz::isa_refusal(level);
    if (!refusal.empty()) {
      std::printf("level %s skipped: %s\n", level.c_str(), refusal.c_str());
      continue;
    }
    dz::set_isa(level);
    for (int round = 0; round < 150; ++round) {
      const Geometry g = any_geometry();
      test_conv2d_tap(g, round % 2 != 0);
      test_channel_conv2d(g, round % 2 != 0);
      if (g.N * g.Ho * g.Wo < 8) continue;  // a variance of next to nothing makes much of a rounding
      const int64_t pool = draw(1, lesser(3, lesser(g.Ho, g.Wo)));
      test_conv2d_tap_batch_norm(g, round % 4 != 0, round % 3 != 0, pool);
      if (g.groups == 1) test_channel_conv2d_batch_norm(g, round % 4 != 0, round % 3 != 0, pool, round % 5 == 0);
    }
    for (const int64_t side : {4, 8, 16, 26}) {  // rows that share a vector, fill it, and several blocks
      const Geometry g = {2, 5, side, side, 18, 3, 1, 3, 3, 1, 1, 1, 1, 1, 1, side, side};
      test_conv2d_tap_batch_norm(g, true, true, 2);
      test_channel_conv2d_batch_norm(g, true, true, 2, side == 8);
    }
    for (const int64_t N : {3, 8}) {  // images that end inside a register, the last one where a row of scratch does
      const int64_t H = N == 3 ? 5 : 4, W = N == 3 ? 5 : 6;
      test_channel_conv2d_batch_norm({2, N, H, W, 16, 2, 1, 1, 1, 1, 1, 0, 0, 1, 1, H, W}, true, true, 1, true);
    }
    for (int round = 0; round < 40; ++round) {
      test_channel_batch_norm(draw(0, 5), draw(2, 4), draw(1, 3), draw(1, 7), draw(2, 9), round % 3 == 0 ? 1e-3f : 1.0f,
                              round % 2 != 0, round % 4 < 2);
      const int64_t height = draw(2, 7), width = draw(2, 9);
      test_dense_conv2d(draw(0, 9), height, width, draw(1, 40), draw(1, 70), draw(1, 2), draw(1, 2));
      test_dense_batch_norm(draw(0, 5), draw(2, 4), draw(1, 40), height, width,
                            draw(1, lesser(3, lesser(height, width))), round % 4, round % 5 != 0, round % 2 == 0,
                            round % 3 == 0);
      test_cross_entropy_difference(draw(0, 5), draw(1, 40), draw(1, 70), round % 3 == 0 ? 1e-3f : 30.0f);
    }
    for (int round = 0; round < 40; ++round) {
      const float scale = round % 3 == 0 ? 1e-3f : round % 3 == 1 ? 0.3f : 20.0f;
      test_gelu_difference(draw(0, 4), draw(1, 700), scale, round % 2 == 0);
      test_mlp_difference(draw(0, 3), draw(1, 80), draw(1, 70), draw(1, 70), draw(1, 70), scale, round % 2 == 0,
                          round % 4 < 2, round % 3 == 0);
      test_linear_difference(draw(0, 3), draw(1, 150), draw(1, 70), draw(1, 130), scale, round % 2 == 0,
                             round % 3 == 0);
      test_layer_norm_difference(draw(0, 4), draw(1, 20), draw(1, 300), scale, round % 2 == 0, round % 4 < 2);
      test_softmax_difference(draw(0, 4), draw(1, 20), draw(1, 300), scale, round % 2 == 0);
      test_attention_difference(draw(0, 3), draw(1, 2), draw(1, 3), draw(0, 80), draw(1, 80), draw(1, 40), draw(1, 80),
                                1 + round % 7);
      test_self_attention_difference(draw(0, 3), draw(1, 2), draw(1, 3), draw(1, 70), draw(1, 20), draw(1, 40),
                                     draw(1, 40), draw(1, 40), round % 2 == 0, round % 3 == 0);
    }
    test_channel_batch_norm(2, 5, 2, 40, 43, 1.0f, true, true);  // several blocks
    test_cross_entropy_difference(2, 3, 3000, 1.0f);             // a row longer than a chunk
  }
  test_dense_conv2d_cuda();
  bool refused = false;
  try {
    dz::set_isa("v9");
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  if (!refused) return 1;
  std::printf("%d comparisons passed\n", checks);
  return 0;
}
