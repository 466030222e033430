#include "gelu.h"

namespace dz {
namespace {

constexpr int64_t kTile = 512;  // base values per tile: their coefficients stay in L1 for all perturbations

template <bool kTanh, typename In, typename Out>
void run_tiles(const In* delta, const float* z, Out* out, int64_t P, int64_t S) {
  const int64_t tiles = ceil_div(S, kTile);
  // Every piece computes the coefficients of its tile. Where tiles are few, perturbations are split too, to occupy
  // all threads; results do not depend on the split.
  const int64_t parts = min_of(P, ceil_div(4 * omp_get_max_threads(), tiles));
#pragma omp parallel
  {
    alignas(64) float terms[BaseTerms::kRows * kTile];
    const BaseTerms bases = {terms, kTile};
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < tiles * parts; ++piece) {
      const int64_t first = piece / parts * kTile, size = min_of(kTile, S - first), part = piece % parts;
      prepare<kTanh>(z + first, size, bases);
      for (int64_t p = part * P / parts; p < (part + 1) * P / parts; ++p)
        changes<kTanh>(bases, delta + p * S + first, out + p * S + first, size);
    }
  }
}

}  // namespace

DZ_KERNEL(gelu_difference, (const void* delta,  // [P, S] float32, or bfloat16 with half
                            const float* z,     // [S]
                            void* out,          // [P, S] float32, or bfloat16 with out_half
                            int64_t P, int64_t S, bool tanh, bool half, bool out_half)) {
  if (P == 0 || S == 0) return;
  with_types(delta, half, out, out_half, [&](const auto* from, auto* to) {
    if (tanh) {
      run_tiles<true>(from, z, to, P, S);
    } else {
      run_tiles<false>(from, z, to, P, S);
    }
  });
}

}  // namespace dz
