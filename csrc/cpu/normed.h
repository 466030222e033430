// The change of a batch norm whose input is perturbed in a few channels, and what follows the norm: one skeleton for
// every producer of the difference before the norm and every epilogue after it.
//
//   shift                   a guess of the mean of d, so that sums about it do not cancel
//   moments                 sums of each block of pixels, added in order: no result depends on the number of threads
//   coefficients            with a second pass over the blocks where the variance cancels
//   result                  piece by piece, with d produced again: it never leaves the cache
//
// A producer gives d for a plane (all pixels of one channel) after the other:
//   kFloatSums              blocks are small enough for sums in float32
//   blocks                  Strips of the pixels whose moments are taken together
//   planes, row             perturbed channels of a perturbation, and floats from one of their planes in d to the next
//   floats()                scratch of one thread
//   channel(p, k)           the channel of the norm that plane k of perturbation p is
//   shift(p, to)            to [planes]
//   take(p, first, last, scratch)  pointer to d [planes][row] of pixels first .. last - 1
// An epilogue makes the result of d and the coefficients:
//   strips                  Strips of the pixels that go into one piece of the result
//   floats()                scratch of one thread
//   prepare(piece, plane, channel, scratch)  what the perturbations that follow share in this piece
//   fetch(p, piece)         asks for memory that store() will write
//   change(p, piece, plane, d, zc, with, scratch)  one plane of one piece
//   store(p, piece, scratch)  once all planes have changed
#pragma once

#include "batch_norm.h"

namespace dz {
namespace {

constexpr int64_t kSums = 4;                   // vectors that are summed side by side
constexpr int64_t kRun = 64 * kSums * kLanes;  // elements whose sums stay in float32: 64 terms each
constexpr int64_t kFloatBlock = 512;           // elements of a block whose sums may all stay in float32

typedef double Wide __attribute__((vector_size(kLanes * sizeof(double))));

DZ_INLINE double sum_of(Wide v) {
  double total = 0.0;
  for (int64_t i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

DZ_INLINE float sum_of(Vec v) {
#pragma GCC unroll 4
  for (int H = kLanes / 2; H > 0; H /= 2) v += __builtin_shuffle(v, kLane ^ H);
  return v[0];
}

// Adds elements `first` to `last` - 1, a multiple of kSums * kLanes of them.
DZ_INLINE void add_vectors(const float* d, const float* zc, float shift, int64_t first, int64_t last, LaneSums* to) {
  for (int64_t i = first; i < last; i += kSums * kLanes) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kSums; ++k) {
      to[k].add(load<Vec>(d + i + k * kLanes) - shift, load<Vec>(zc + i + k * kLanes));
    }
  }
}

// The moments of `size` elements, in float32 for runs of kRun and in float64 from there on.
inline Moments moments(const float* d, const float* zc, float shift, int64_t size) {
  Wide e = {}, e2 = {}, ze = {};
  int64_t i = 0;
  while (size - i >= kSums * kLanes) {
    const int64_t end = i + lesser(kRun, (size - i) / (kSums * kLanes) * (kSums * kLanes));
    LaneSums run[kSums];
    add_vectors(d, zc, shift, i, end, run);
    i = end;
    for (int64_t k = 0; k < kSums; ++k) {
      e += __builtin_convertvector(run[k].e, Wide);
      e2 += __builtin_convertvector(run[k].e2, Wide);
      ze += __builtin_convertvector(run[k].ze, Wide);
    }
  }
  Moments sums = {sum_of(e), sum_of(e2), sum_of(ze)};
  for (; i < size; ++i) {
    const double one = d[i] - shift;
    sums += {one, one * one, one * zc[i]};
  }
  return sums;
}

// The same in float32 alone, for a small block: at most 64 terms in a row at any level, then a tree.
inline Moments float_moments(const float* d, const float* zc, float shift, int64_t size) {
  if (size > kFloatBlock) return moments(d, zc, shift, size);  // a long row
  LaneSums sums[kSums];
  int64_t i = size / (kSums * kLanes) * (kSums * kLanes);
  add_vectors(d, zc, shift, 0, i, sums);
  for (; i < size; i += kLanes) {
    const int64_t count = lesser(kLanes, size - i);
    const Vec e = load_some(d + i, count) - shift;
    sums[0].add(kLane < static_cast<int32_t>(count) ? e : Vec{}, load_some(zc + i, count));
  }
  const auto all = [&](auto part) { return sum_of((part(sums[0]) + part(sums[1])) + (part(sums[2]) + part(sums[3]))); };
  return {all([](const LaneSums& s) { return s.e; }), all([](const LaneSums& s) { return s.e2; }),
          all([](const LaneSums& s) { return s.ze; })};
}

// The sum of (zc + d - mean_d)^2.
inline double perturbed_squares(const float* zc, const float* d, double mean_d, int64_t size) {
  double total = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    const double perturbed = zc[i] + (d[i] - mean_d);
    total += perturbed * perturbed;
  }
  return total;
}

struct BatchNorm {
  const float* zc;            // [C, pixels] centred base input
  const double *var, *gamma;  // [C]
  double eps;
  int64_t P, pixels;
  bool training;

  double before(int64_t channel) const { return var[channel] + eps; }
  const float* base(int64_t channel, int64_t pixel) const { return zc + channel * pixels + pixel; }
};

template <class Producer, class Epilogue>
class Normed {
 public:
  Normed(const BatchNorm& norm_, const Producer& producer_, const Epilogue& epilogue_)
      : norm(norm_),
        producer(producer_),
        epilogue(epilogue_),
        planes(producer.planes),
        taken(ceil_div(producer.floats(), 16) * 16),
        each(taken + ceil_div(epilogue.floats(), 16) * 16),
        scratch(omp_get_max_threads() * each),
        shifts(norm.training ? norm.P * planes : 0),
        sums(norm.training ? norm.P * producer.blocks.pieces * planes : 0),
        coefficients(norm.P * planes) {}

  // Blocks outside, perturbations inside: what a block reads stays in cache for all perturbations.
  void run() const {
#pragma omp parallel
    {
      float* own = scratch.data + omp_get_thread_num() * each;
      if (norm.training) {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < norm.P; ++p) producer.shift(p, shifts.data + p * planes);
#pragma omp for schedule(static)
        for (int64_t k = 0; k < producer.blocks.pieces; ++k) {
          const Piece block = producer.blocks.piece(k);
          for (int64_t p = 0; p < norm.P; ++p) sum(p, k, block, own);
        }
      }
#pragma omp for schedule(static)
      for (int64_t p = 0; p < norm.P; ++p) finish(p, own);
#pragma omp for schedule(static)
      for (int64_t k = 0; k < epilogue.strips.pieces; ++k) {
        const Piece piece = epilogue.strips.piece(k);
        for (int64_t p = 0; p < norm.P; ++p) write(p, piece, p == 0, own);
      }
    }
  }

 private:
  // The moments of block k.
  void sum(int64_t p, int64_t k, const Piece& block, float* own) const {
    constexpr auto moments_of = Producer::kFloatSums ? &float_moments : &moments;
    const float* d = producer.take(p, block.begin, block.end, own);
    Moments* to = sums.data + (p * producer.blocks.pieces + k) * planes;
    for (int64_t i = 0; i < planes; ++i) {
      to[i] = moments_of(d + i * producer.row, norm.base(producer.channel(p, i), block.begin),
                         shifts.data[p * planes + i], block.end - block.begin);
    }
  }

  void finish(int64_t p, float* own) const {
    for (int64_t i = 0; i < planes; ++i) {
      const int64_t channel = producer.channel(p, i), pieces = producer.blocks.pieces, at = p * planes + i;
      const double before = norm.before(channel), gamma = norm.gamma[channel];
      if (!norm.training) {
        coefficients.data[at] = evaluation_coefficients(before, gamma);
        continue;
      }
      Moments all = {};
      for (int64_t k = 0; k < pieces; ++k) all += sums.data[(p * pieces + k) * planes + i];
      coefficients.data[at] =
          training_coefficients(all, shifts.data[at], norm.pixels, before, gamma, [&](double mean_d) {
            double squares = 0.0;
            for (int64_t k = 0; k < pieces; ++k) {
              const Piece block = producer.blocks.piece(k);
              const float* d = producer.take(p, block.begin, block.end, own) + i * producer.row;
              squares += perturbed_squares(norm.base(channel, block.begin), d, mean_d, block.end - block.begin);
            }
            return squares / static_cast<double>(norm.pixels) + norm.eps;
          });
    }
  }

  // A piece of the result. What is prepared serves all perturbations in a row that have the same channels.
  void write(int64_t p, const Piece& piece, bool first, float* own) const {
    epilogue.fetch(p, piece);
    const float* d = producer.take(p, piece.begin, piece.end, own);
    for (int64_t i = 0; i < planes; ++i) {
      const int64_t channel = producer.channel(p, i);
      if (first || channel != producer.channel(p - 1, i)) epilogue.prepare(piece, i, channel, own + taken);
      epilogue.change(p, piece, i, d + i * producer.row, norm.base(channel, piece.begin),
                      coefficients.data[p * planes + i], own + taken);
    }
    epilogue.store(p, piece, own + taken);
  }

  const BatchNorm& norm;
  const Producer& producer;
  const Epilogue& epilogue;
  int64_t planes, taken, each;
  Scratch<float> scratch, shifts;
  Scratch<Moments> sums;
  Scratch<Coefficients<float>> coefficients;
};

}  // namespace
}  // namespace dz
