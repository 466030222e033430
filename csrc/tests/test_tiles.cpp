// The tensor-core convolution of csrc/cuda, as plain C++, in every way to lay its tiles: recorded calls
// (replay_cuda.cpp) do not choose how many blocks there are, nor how much shared memory. Built with the sanitizers by
// .ci/run.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/dense_conv2d.cuh"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

int checks = 0;

std::mt19937 random_bits(1);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

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
      launch_on_host(dz::dense_conv2d_kernel<Block>, dim3(g.blocks, static_cast<unsigned>(O / Block::kOuts)),
                     Block::kThreads, static_cast<size_t>(s.shared), any_order(), from, with, to, s);
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

}  // namespace

int main() {
  test_dense_conv2d_cuda();
  std::printf("%d convolutions passed\n", checks);
  return 0;
}
