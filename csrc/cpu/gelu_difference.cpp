#include "gelu.h"

namespace dz {
namespace {

constexpr int64_t kTile = 512;  // base elements whose coefficients stay in L1 over the perturbations

template <bool kTanh, typename In, typename Out>
void all(const In* delta, const float* z, Out* out, int64_t P, int64_t S) {
  const int64_t tiles = ceil_div(S, kTile);
  // Each piece makes the coefficients of its tile; few tiles are split by perturbations as well. No element depends on
  // the split.
  const int64_t parts = lesser(P, ceil_div(4 * omp_get_max_threads(), tiles));
#pragma omp parallel
  {
    alignas(64) float known[Bases::kRows * kTile];
    const Bases bases = {known, kTile};
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < tiles * parts; ++piece) {
      const int64_t first = piece / parts * kTile, size = lesser(kTile, S - first), part = piece % parts;
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
      all<true>(from, z, to, P, S);
    } else {
      all<false>(from, z, to, P, S);
    }
  });
}

}  // namespace dz
