// Matrix products for small matrices. The right factor is packed once and used many times.
#pragma once

#include "elementary.h"

namespace dz {
namespace {

constexpr int64_t kPanelRegisters = kLanes == 16 ? 4 : 2;  // maximum registers of columns in a panel

// Columns of a panel: kPanelRegisters registers, or one register less where that leaves a wider last panel.
DZ_INLINE int64_t panel_width(int64_t columns) {
  const int64_t registers = ceil_div(columns, kLanes), least = kPanelRegisters - 1;
  const bool fewer = kLanes == 16 && registers % kPanelRegisters != 0 &&
                     (registers % least == 0 || registers % kPanelRegisters < registers % least);
  return (fewer ? least : kPanelRegisters) * kLanes;
}

// One step of a register transpose: swaps the off-diagonal H x H blocks. transpose<1> runs the steps H = 1, 2, 4, ...
template <int H>
DZ_INLINE void transpose(Vec (&v)[kLanes]) {
  constexpr int lanes = kLanes;
  const Mask low = (kLane & H) != 0 ? kLane + (lanes - H) : kLane;
  const Mask high = (kLane & H) != 0 ? kLane + lanes : kLane + H;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & H) == 0) {
      const Vec a = v[i], b = v[i + H];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + H] = __builtin_shuffle(a, b, high);
    }
  }
  if constexpr (2 * H < kLanes) transpose<2 * H>(v);
}

// A packed right factor [depth, columns] is a sequence of panels, each [depth][panel_width(columns)]; the last panel is
// narrower. Columns are padded with zeros to whole registers. pack and pack_transposed write `rows` rows of it,
// starting at row `first`.

// Row r, column c is from[c * stride + r].
template <typename T>
void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t columns, int64_t depth, int64_t first,
                     float* to) {
  const int64_t all = ceil_div(columns, kLanes) * kLanes, widest = panel_width(columns);
  for (int64_t c = 0; c < all; c += kLanes) {
    const int64_t panel = c / widest * widest, width = min_of(widest, all - panel);
    const int64_t count = min_of(kLanes, columns - c);
    float* out = to + panel * depth + first * width + (c - panel);
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t size = min_of(kLanes, rows - r);
      Vec v[kLanes];
      if (count == kLanes && size == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = load_vec(from + (c + i) * stride + r);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = i < count ? load_partial(from + (c + i) * stride + r, size) : Vec{};
      }
      transpose<1>(v);
      if (size == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(out + (r + i) * width, v[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          if (i < size) store(out + (r + i) * width, v[i]);
        }
      }
    }
  }
}

template <typename T>
void pack(const T* from, int64_t stride, int64_t rows, int64_t columns, int64_t depth, int64_t first, float* to) {
  const int64_t all = ceil_div(columns, kLanes) * kLanes, widest = panel_width(columns);
  for (int64_t c = 0; c < all; c += kLanes) {
    const int64_t panel = c / widest * widest, width = min_of(widest, all - panel);
    const int64_t count = min_of(kLanes, columns - c);
    float* out = to + panel * depth + first * width + (c - panel);
    for (int64_t r = 0; r < rows; ++r) store(out + r * width, load_partial(from + r * stride + c, count));
  }
}

// Offsets of the rows of a panel: contiguous in a packed matrix, arbitrary with RowOffsets.
struct Packed {
  template <int REGISTERS>
  DZ_INLINE int64_t row(int64_t t) const {
    return t * REGISTERS * kLanes;
  }
};

struct RowOffsets {
  const int64_t* offsets;

  template <int REGISTERS>
  DZ_INLINE int64_t row(int64_t t) const {
    return offsets[t];
  }
};

// out[i, j] = sum_t left[i, t] * panel[t, j] for ROWS rows and REGISTERS registers of columns. The accumulators stay in
// registers. The sum runs over t in order whatever the tile shape, so results do not depend on the tiling.
template <int ROWS, int REGISTERS, typename Layout, typename Out>
DZ_INLINE void tile(const float* left, int64_t left_row, const float* panel, Layout layout, int64_t depth, Out* out,
                    int64_t out_row, int64_t columns) {
  Vec sum[ROWS][REGISTERS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < REGISTERS; ++r) sum[i][r] = Vec{};
  }
  for (int64_t t = 0; t < depth; ++t) {
    Vec right[REGISTERS];
#pragma GCC unroll 4
    for (int r = 0; r < REGISTERS; ++r) right[r] = load<Vec>(panel + layout.template row<REGISTERS>(t) + r * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec value = left[i * left_row + t] - Vec{};
#pragma GCC unroll 4
      for (int r = 0; r < REGISTERS; ++r) sum[i][r] += value * right[r];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < REGISTERS; ++r) {
      Out* to = out + i * out_row + r * kLanes;
      const int64_t count = columns - r * kLanes;
      if (count >= kLanes) {
        store_vec(to, sum[i][r]);
      } else if (count > 0) {
        store_first(to, sum[i][r], count);
      }
    }
  }
}

// All rows of one panel. The last tile, of ROWS rows or half as many, overlaps the previous one and writes the same
// values again.
template <int ROWS, int REGISTERS, typename Layout, typename Out>
void panel_product(const float* left, int64_t left_row, int64_t rows, const float* panel, Layout place, int64_t depth,
                   Out* out, int64_t out_row, int64_t columns) {
  constexpr int half = (ROWS + 1) / 2;
  int64_t i = 0;
  for (; i + half < rows && rows >= ROWS; i += ROWS) {
    const int64_t at = min_of(i, rows - ROWS);
    tile<ROWS, REGISTERS>(left + at * left_row, left_row, panel, place, depth, out + at * out_row, out_row, columns);
  }
  if (i >= rows) return;
  if constexpr (ROWS > 1) {
    const int64_t at = rows >= ROWS ? rows - half : 0;
    panel_product<half, REGISTERS>(left + at * left_row, left_row, rows - at, panel, place, depth, out + at * out_row,
                                   out_row, columns);
  } else {
    tile<1, REGISTERS>(left + i * left_row, left_row, panel, place, depth, out + i * out_row, out_row, columns);
  }
}

// Rows of a tile: the accumulators take at most three quarters of the 32 (AVX-512) or 16 registers.
constexpr int tile_rows(int registers) { return kLanes == 16 && registers < 4 ? 8 : registers == 1 ? 8 : 6; }

// Uses the fewest registers that hold `columns`.
template <int REGISTERS, typename Layout, typename Out>
void fitting_product(const float* left, int64_t left_row, int64_t rows, const float* panel, Layout place, int64_t depth,
                     Out* out, int64_t out_row, int64_t columns) {
  if (columns > (REGISTERS - 1) * kLanes) {
    panel_product<tile_rows(REGISTERS), REGISTERS>(left, left_row, rows, panel, place, depth, out, out_row, columns);
  } else if constexpr (REGISTERS > 1) {
    fitting_product<REGISTERS - 1>(left, left_row, rows, panel, place, depth, out, out_row, columns);
  }
}

// out[rows, columns] = left[rows, depth] packed[depth, columns]
template <typename Out>
void product(const float* left, int64_t left_row, int64_t rows, const float* packed, int64_t depth, Out* out,
             int64_t out_row, int64_t columns) {
  const int64_t widest = panel_width(columns);
  for (int64_t c = 0; c < columns; c += widest) {
    const int64_t count = min_of(widest, columns - c);
    fitting_product<kPanelRegisters>(left, left_row, rows, packed + c * depth, Packed(), depth, out + c, out_row,
                                     count);
  }
}

// The same where row t of the right factor starts at right + offsets[t]. Rows are read in whole registers, so memory
// past their last column must be readable.
template <typename Out>
void product_of_rows(const float* left, int64_t left_row, int64_t rows, const float* right, const int64_t* offsets,
                     int64_t depth, Out* out, int64_t out_row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kPanelRegisters * kLanes) {
    const int64_t count = min_of(kPanelRegisters * kLanes, columns - c);
    fitting_product<kPanelRegisters>(left, left_row, rows, right + c, RowOffsets{offsets}, depth, out + c, out_row,
                                     count);
  }
}

// One interface to two products with float32 sums: of float32 factors, and of bfloat16 factors on AMX tiles.
//
//   Number     type of both factors
//   kRows      rows of the left factor are padded to a multiple of it; padding must be finite
//   depth(K)   padded length of a row of the left factor
//   kUnpadded  true where the left factor needs no padding and nothing is written outside [rows, columns]
//   Session    state that a thread holds while it multiplies

// kRound rounds the right factor to bfloat16.
template <bool kRound>
struct VectorProduct {
  typedef float Number;
  static constexpr int64_t kRows = 1;
  static constexpr bool kUnpadded = true;
  struct Session {};

  static int64_t depth(int64_t K) { return K; }

  // Packs from [columns, K] as the right factor [K, columns].
  static void pack(const float* from, int64_t columns, int64_t K, float* to) {
    pack_transposed(from, K, K, columns, K, 0, to);
    if (!kRound) return;
    for (int64_t i = 0; i < ceil_div(columns, kLanes) * kLanes * K; ++i) {
      Bf16 half;
      store_one(&half, to[i]);
      to[i] = to_float(half);
    }
  }

  static void multiply(const float* left, int64_t left_row, int64_t rows, const float* packed, int64_t K, float* out,
                       int64_t out_row, int64_t columns) {
    product(left, left_row, rows, packed, K, out, out_row, columns);
  }
};

#if defined(__AMX_BF16__)

struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A packed matrix is [columns / 16][depth / 32] tiles. A tile holds 16 pairs of rows by 16 columns.
struct HalfProduct {
  typedef Bf16 Number;
  static constexpr int64_t kRows = 32;
  static constexpr bool kUnpadded = false;
  struct Session {
    Session() {
      const TileShapes shapes;
      _tile_loadconfig(&shapes);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  static int64_t depth(int64_t K) { return ceil_div(K, 32) * 32; }

  static void pack(const float* from, int64_t columns, int64_t K, Bf16* to) {
    for (int64_t c = 0; c < ceil_div(columns, 16) * 16; ++c) {
      Bf16* column = to + c / 16 * 16 * depth(K) + c % 16 * 2;
      for (int64_t k = 0; k < depth(K); ++k) {
        store_one(column + k / 2 * 32 + k % 2, c < columns && k < K ? from[c * K + k] : 0.0f);
      }
    }
  }

  static void multiply(const Bf16* left, int64_t left_row, int64_t rows, const Bf16* packed, int64_t K, float* out,
                       int64_t out_row, int64_t columns) {
    for (int64_t i = 0; i < rows; i += kRows) {
      int64_t c = 0;
      for (; c + 16 < columns; c += 32) {
        block<true>(left + i * left_row, left_row, packed + c * depth(K), depth(K), out + i * out_row + c, out_row);
      }
      if (c < columns) {
        block<false>(left + i * left_row, left_row, packed + c * depth(K), depth(K), out + i * out_row + c, out_row);
      }
    }
  }

 private:
  // 32 rows by 16 or 32 columns of the result. The compiler is not told that the intrinsics access memory, hence the
  // barriers.
  template <bool kTwo>
  static void block(const Bf16* left, int64_t left_row, const Bf16* packed, int64_t depth, float* out,
                    int64_t out_row) {
    const Bf16 *below = left + 16 * left_row, *beside = packed + 16 * depth;
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    if (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t t = 0; t < depth; t += 32) {
      _tile_loadd(4, left + t, left_row * 2);
      _tile_loadd(5, below + t, left_row * 2);
      _tile_loadd(6, packed + t * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (kTwo) {
        _tile_loadd(7, beside + t * 16, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out, out_row * 4);
    _tile_stored(1, out + 16 * out_row, out_row * 4);
    if (kTwo) {
      _tile_stored(2, out + 16, out_row * 4);
      _tile_stored(3, out + 16 * out_row + 16, out_row * 4);
    }
    __asm__ volatile("" ::: "memory");
  }
};

#else

typedef VectorProduct<true> HalfProduct;

#endif

}  // namespace
}  // namespace dz
