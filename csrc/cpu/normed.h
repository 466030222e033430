// The change of a batch norm whose input is perturbed in a few channels, followed by an epilogue. One skeleton serves
// every producer of d, the change of the norm's input, and every epilogue. Its four passes:
//
//   shift         an estimate of the mean of d, about which the sums do not cancel
//   moments       sums per block of pixels, added in a fixed order: results do not depend on the number of threads
//   coefficients  with another pass over the blocks where the variance cancels
//   result        piece by piece; d is produced again, which is cheaper than storing it
//
// A producer computes d plane by plane, a plane being all pixels of one channel:
//   kFloatSums       blocks are small enough for sums in float32
//   blocks           Strips: the blocks of pixels of the moments
//   planes           number of perturbed channels per perturbation
//   row              floats from one plane of d to the next
//   floats()         scratch floats per thread
//   channel(p, k)    channel of the norm for plane k of perturbation p
//   shift(p, to)     writes to [planes]
//   produce(p, first, last, scratch)  returns d [planes][row] for pixels first .. last - 1
//
// An epilogue turns d and the coefficients into the result:
//   strips           Strips: the pieces of the result
//   floats()         scratch floats per thread
//   prepare(piece, plane, channel, scratch)  computes the base values that all perturbations of a channel share
//   prefetch(p, piece)  prefetches the memory that store() writes
//   change(p, piece, plane, d, zc, with, scratch)  computes one plane of one piece
//   store(p, piece, scratch)  writes the piece once all planes are computed
#pragma once

#include "batch_norm.h"

namespace dz {
namespace {

constexpr int64_t kSums = 4;                   // independent vector accumulators
constexpr int64_t kRun = 64 * kSums * kLanes;  // elements summed in float32 at a time: 64 terms per accumulator
constexpr int64_t kFloatBlock = 512;           // largest block that float_moments sums in float32

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

// Adds elements first .. last - 1. Their number is a multiple of kSums * kLanes.
DZ_INLINE void add_vectors(const float* d, const float* zc, float shift, int64_t first, int64_t last, LaneSums* to) {
  for (int64_t i = first; i < last; i += kSums * kLanes) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kSums; ++k) {
      to[k].add(load<Vec>(d + i + k * kLanes) - shift, load<Vec>(zc + i + k * kLanes));
    }
  }
}

// The moments of `size` elements: runs of kRun elements in float32, the sum of runs in float64.
inline Moments moments(const float* d, const float* zc, float shift, int64_t size) {
  Wide e = {}, e2 = {}, ze = {};
  int64_t i = 0;
  while (size - i >= kSums * kLanes) {
    const int64_t end = i + min_of(kRun, (size - i) / (kSums * kLanes) * (kSums * kLanes));
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

// The same in float32 alone, for a small block: at most 64 terms per accumulator at any level, then a tree.
inline Moments float_moments(const float* d, const float* zc, float shift, int64_t size) {
  if (size > kFloatBlock) return moments(d, zc, shift, size);  // one row may be longer than a block should be
  LaneSums sums[kSums];
  int64_t i = size / (kSums * kLanes) * (kSums * kLanes);
  add_vectors(d, zc, shift, 0, i, sums);
  for (; i < size; i += kLanes) {
    const int64_t count = min_of(kLanes, size - i);
    const Vec e = load_partial(d + i, count) - shift;
    sums[0].add(kLane < static_cast<int32_t>(count) ? e : Vec{}, load_partial(zc + i, count));
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
        producer_floats(ceil_div(producer.floats(), 16) * 16),
        thread_floats(producer_floats + ceil_div(epilogue.floats(), 16) * 16),
        scratch(omp_get_max_threads() * thread_floats),
        shifts(norm.training ? norm.P * planes : 0),
        sums(norm.training ? norm.P * producer.blocks.pieces * planes : 0),
        coefficients(norm.P * planes) {}

  // Loops over blocks outside, over perturbations inside: the inputs of a block stay in cache for all perturbations.
  void run() const {
#pragma omp parallel
    {
      float* thread_scratch = scratch.data + omp_get_thread_num() * thread_floats;
      if (norm.training) {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < norm.P; ++p) producer.shift(p, shifts.data + p * planes);
#pragma omp for schedule(static)
        for (int64_t k = 0; k < producer.blocks.pieces; ++k) {
          const Piece block = producer.blocks.piece(k);
          for (int64_t p = 0; p < norm.P; ++p) sum(p, k, block, thread_scratch);
        }
      }
#pragma omp for schedule(static)
      for (int64_t p = 0; p < norm.P; ++p) finish(p, thread_scratch);
#pragma omp for schedule(static)
      for (int64_t k = 0; k < epilogue.strips.pieces; ++k) {
        const Piece piece = epilogue.strips.piece(k);
        for (int64_t p = 0; p < norm.P; ++p) write(p, piece, p == 0, thread_scratch);
      }
    }
  }

 private:
  // The moments of block k.
  void sum(int64_t p, int64_t k, const Piece& block, float* thread_scratch) const {
    constexpr auto moments_of = Producer::kFloatSums ? &float_moments : &moments;
    const float* d = producer.produce(p, block.begin, block.end, thread_scratch);
    Moments* to = sums.data + (p * producer.blocks.pieces + k) * planes;
    for (int64_t i = 0; i < planes; ++i) {
      to[i] = moments_of(d + i * producer.row, norm.base(producer.channel(p, i), block.begin),
                         shifts.data[p * planes + i], block.end - block.begin);
    }
  }

  void finish(int64_t p, float* thread_scratch) const {
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
              const float* d = producer.produce(p, block.begin, block.end, thread_scratch) + i * producer.row;
              squares += perturbed_squares(norm.base(channel, block.begin), d, mean_d, block.end - block.begin);
            }
            return squares / static_cast<double>(norm.pixels) + norm.eps;
          });
    }
  }

  // One piece of the result. Consecutive perturbations of the same channel share what prepare() computed.
  void write(int64_t p, const Piece& piece, bool first, float* thread_scratch) const {
    epilogue.prefetch(p, piece);
    const float* d = producer.produce(p, piece.begin, piece.end, thread_scratch);
    for (int64_t i = 0; i < planes; ++i) {
      const int64_t channel = producer.channel(p, i);
      if (first || channel != producer.channel(p - 1, i))
        epilogue.prepare(piece, i, channel, thread_scratch + producer_floats);
      epilogue.change(p, piece, i, d + i * producer.row, norm.base(channel, piece.begin),
                      coefficients.data[p * planes + i], thread_scratch + producer_floats);
    }
    epilogue.store(p, piece, thread_scratch + producer_floats);
  }

  const BatchNorm& norm;
  const Producer& producer;
  const Epilogue& epilogue;
  int64_t planes, producer_floats, thread_floats;
  Scratch<float> scratch, shifts;
  Scratch<Moments> sums;
  Scratch<Coefficients<float>> coefficients;
};

}  // namespace
}  // namespace dz
