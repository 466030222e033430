#pragma once

#include "common.cuh"
#include "warp.cuh"

namespace dz {

// A 3x3 convolution of channels-last images as an implicit matrix product, [output pixels] x [output channels], summed
// over nine taps and the input channels. A tile is a box of output pixels: `tile_images` whole images, or part of one.
// Its patch, the input pixels that it reads, is copied to shared memory one slice of channels at a time, with zeros for
// padding. All nine taps read from there.
struct DenseConv2d {
  int64_t images;
  int H, W, C, Ho, Wo, O, stride_h, stride_w, pad_h, pad_w;  // strides are 1 or 2
  // set by plan()
  int tile_images, tile_h, tile_w, patch_h, patch_w;
  int down, across;  // an image has down x across tiles
  int tiles;         // in all
  int64_t shared;    // bytes of shared memory
};

constexpr int kTaps = 9;
constexpr int kTilePixels = 256;  // maximum output pixels of a tile
constexpr int64_t kMaxTiles = int64_t{1} << 30;

__host__ __device__ inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// With a stride of 2 even columns of a patch are stored before odd ones, so that neighbouring outputs read neighbouring
// addresses in shared memory. `phase` is the number of columns of one parity.
__host__ __device__ inline int phase_of(const DenseConv2d& s) { return divide_up(s.patch_w, s.stride_w); }
__device__ inline int column_of(int x, int stride, int phase) {
  return (x & (stride - 1)) * phase + (x >> (stride - 1));
}

// Parameters of a block: values of type T, slices of BYTES bytes of a pixel's channels, OUTS output channels.
template <typename T, int BYTES, int OUTS>
struct ConvBlock {
  using Type = T;
  static constexpr int kOuts = OUTS;
  static constexpr int kUnits = BYTES / 16;  // 16-byte copies per pixel and slice
  static constexpr int kUnitValues = 16 / static_cast<int>(sizeof(T));
  static constexpr int kSlice = kUnits * kUnitValues;  // channels of a slice
  static constexpr int kDepth = BYTES / 32;            // matrix products per tap: 32 bytes of channels each
  static constexpr int kPitch = BYTES + 16;            // bytes from pixel to pixel: eight neighbours hit all banks once
  static constexpr int kRows = OUTS * static_cast<int>(sizeof(T)) > 64 ? 2 : 4;  // groups of 16 pixels per warp
  static constexpr int kWarps = kTilePixels / (16 * kRows);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kResident = kThreads > 128 ? 1
                                   : OUTS == 16   ? 4
                                                  : 3;  // blocks per multiprocessor that registers allow
  static constexpr int kStages = 2;  // patches in shared memory: one is read while the others are being copied
  static constexpr int kParts = sizeof(T) == 4 ? 2 : 1;              // a float32 operand is split into two tf32
  static constexpr int kRun = sizeof(T) == 4 || OUTS == 16 ? 2 : 4;  // products whose results a thread stores together

  // Bytes from one output channel's weights to the next. They are stored in order of use; the pitch is an odd multiple
  // of 16 to avoid bank conflicts.
  __host__ __device__ static int64_t weight_pitch(int C) { return static_cast<int64_t>(kTaps * sizeof(T)) * C + 16; }

  // The output channel in column n of the product, chosen so that a thread holds adjacent channels.
  __device__ static int channel_of(int n) {
    const int product = n / 8, column = n % 8;
    return product / kRun * 8 * kRun + column / 2 * 2 * kRun + product % kRun * 2 + column % 2;
  }

  __host__ __device__ static int64_t patch_bytes(const DenseConv2d& s) {
    return static_cast<int64_t>(s.tile_images) * s.patch_h * s.stride_w * phase_of(s) * kPitch;
  }
};

// Position of a pixel in a tile.
struct alignas(8) ConvPixel {
  int offset;     // in the output, from the first pixel of the tile
  int16_t image;  // in the tile; INT16_MAX for a pixel past its end
  uint8_t row, column;
};

// Origin of a tile: its first image, output row and output column.
struct ConvTile {
  int64_t image;
  int row, column;
};

__device__ inline ConvTile tile_at(const DenseConv2d& s, int tile) {
  const int of_image = s.down * s.across, within = tile % of_image;
  return {static_cast<int64_t>(tile / of_image) * s.tile_images, within / s.across * s.tile_h,
          within % s.across * s.tile_w};
}

// Starts the copy of one slice of a tile's patch. A warp copies whole rows.
template <typename Block, typename T>
__device__ inline void copy_patch(const DenseConv2d& s, const T* delta, const ConvTile& tile, int slice, uint32_t to) {
  const int lane = static_cast<int>(threadIdx.x) % 32, phase = phase_of(s), row_pixels = s.stride_w * phase;
  const int top = tile.row * s.stride_h - s.pad_h, left = tile.column * s.stride_w - s.pad_w;
  int image = 0, y = static_cast<int>(threadIdx.x) / 32;
  for (int row = y; row < s.tile_images * s.patch_h; row += Block::kWarps, y += Block::kWarps) {
    while (y >= s.patch_h) y -= s.patch_h, ++image;
    const bool inside_image = tile.image + image < s.images && top + y >= 0 && top + y < s.H;
    const int64_t from = (((tile.image + image) * s.H + top + y) * s.W + left) * s.C + slice * Block::kSlice;
    for (int unit = lane; unit < s.patch_w * Block::kUnits; unit += 32) {
      const int x = unit / Block::kUnits, part = unit % Block::kUnits;
      const bool inside = inside_image && left + x >= 0 && left + x < s.W;
      const int64_t at = from + (x * s.C + part * Block::kUnitValues);
      const int pixel = row * row_pixels + column_of(x, s.stride_w, phase);
      copy_async(to + static_cast<uint32_t>(pixel * Block::kPitch + part * 16), inside ? delta + at : delta, inside);
    }
  }
}

// Starts the copy of the weights [O, 3, 3, C] of the block's output channels, beginning at `first`.
template <typename Block, typename T>
__device__ inline void copy_weights(const DenseConv2d& s, const T* weight, int first, uint32_t to) {
  const int units = kTaps * s.C / Block::kUnitValues;
  for (int i = static_cast<int>(threadIdx.x); i < Block::kOuts * units; i += Block::kThreads) {
    const int n = i / units, unit = i % units, part = unit % Block::kUnits;
    const int tap = unit / Block::kUnits % kTaps, slice = unit / Block::kUnits / kTaps;
    const int64_t from = (static_cast<int64_t>(first + Block::channel_of(n)) * kTaps + tap) * s.C;
    copy_async(to + static_cast<uint32_t>(n * Block::weight_pitch(s.C) + unit * 16),
               weight + from + slice * Block::kSlice + part * Block::kUnitValues, true);
  }
}

// Splits float32 operands into the nearest tf32 and the exact remainder, of whose 13 bits a tensor core reads 11.
// bfloat16 operands (PARTS = 1) are left as they are.
template <int PARTS, int COUNT>
__device__ inline void split(uint32_t (&parts)[PARTS][COUNT]) {
  if constexpr (PARTS == 2) {
    DZ_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      const float value = as_float(parts[0][i]);
      parts[0][i] = (parts[0][i] + 0x1000u) & 0xffffe000u;
      parts[1][i] = as_bits(value - as_float(parts[0][i]));
    }
  }
}

// Adds one product, of split operands as three: the product of the two remainders, at most 2^-22 of it, is left out.
template <int PARTS>
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[PARTS][4], const uint32_t (&b)[PARTS][4],
                                int column) {
  if constexpr (PARTS == 2) {
    multiply_tf32(sum, a[1], b[0] + column);
    multiply_tf32(sum, a[0], b[1] + column);
    multiply_tf32(sum, a[0], b[0] + column);
  } else {
    multiply_bfloat16(sum, a[0], b[0] + column);
  }
}

// Blocks along x share the tiles, blocks along y the output channels. delta [images, H, W, C], weight [O, 3, 3, C],
// out [images, Ho, Wo, O], all aligned to 16 bytes. Needs exactly Block::kThreads threads.
template <typename Block, typename T = typename Block::Type>
__global__ void __launch_bounds__(Block::kThreads, Block::kResident)
    dense_conv2d_kernel(const T* delta, const T* weight, T* out, DenseConv2d s) {
  DZ_SHARED(ConvPixel, pixels);
  constexpr int kOuts = Block::kOuts, kRows = Block::kRows, kRun = Block::kRun;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first = static_cast<int>(blockIdx.y) * kOuts, count = s.tile_images * s.tile_h * s.tile_w;
  const int phase = phase_of(s), row_pixels = s.stride_w * phase;
  const uint32_t weights = shared_address(pixels + kTilePixels);
  const uint32_t patches = weights + static_cast<uint32_t>(kOuts * Block::weight_pitch(s.C));
  const uint32_t patch_bytes = static_cast<uint32_t>(Block::patch_bytes(s));

  for (int m = static_cast<int>(threadIdx.x); m < kTilePixels; m += Block::kThreads) {
    const int column = m % s.tile_w, row = m / s.tile_w % s.tile_h, image = m / s.tile_w / s.tile_h;
    pixels[m] = {(image * s.Ho + row) * s.Wo + column, static_cast<int16_t>(m < count ? image : INT16_MAX),
                 static_cast<uint8_t>(row), static_cast<uint8_t>(column)};
  }
  // Addresses that this lane passes to load_matrices: 16 bytes of a pixel, and 16 bytes of an output channel's weights.
  uint32_t pixel_at[kRows], weight_at[kOuts / 16];
  DZ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int m = (warp * kRows + r) * 16 + lane % 16, pixel = m < count ? m : 0;
    const int column = pixel % s.tile_w, row = pixel / s.tile_w % s.tile_h, image = pixel / s.tile_w / s.tile_h;
    const int at = (image * s.patch_h + row * s.stride_h) * row_pixels + column;
    pixel_at[r] = patches + static_cast<uint32_t>(at * Block::kPitch + lane / 16 * 16);
  }
  DZ_UNROLL
  for (int n = 0; n < kOuts / 16; ++n) {
    const int64_t row = n * 16 + lane / 16 * 8 + lane % 8;
    weight_at[n] = weights + static_cast<uint32_t>(row * Block::weight_pitch(s.C) + lane / 8 % 2 * 16);
  }
  const uint32_t row_bytes = static_cast<uint32_t>(row_pixels * Block::kPitch);
  uint32_t column_bytes[3];
  DZ_UNROLL
  for (int j = 0; j < 3; ++j) {
    column_bytes[j] = static_cast<uint32_t>(column_of(j, s.stride_w, phase) * Block::kPitch);
  }

  const int slices = s.C / Block::kSlice;
  int ahead = static_cast<int>(blockIdx.x);  // the tile whose patch is copied next
  int ahead_slice = 0, ahead_stage = 0;
  const auto copy_next = [&] {
    if (ahead < s.tiles) {
      copy_patch<Block>(s, delta, tile_at(s, ahead), ahead_slice,
                        patches + static_cast<uint32_t>(ahead_stage) * patch_bytes);
    }
    commit_copies();
    if (++ahead_slice == slices) ahead_slice = 0, ahead += static_cast<int>(gridDim.x);
    if (++ahead_stage == Block::kStages) ahead_stage = 0;
  };
  copy_weights<Block>(s, weight, first, weights);
  for (int stage = 0; stage < Block::kStages - 1; ++stage) copy_next();

  float sum[kRows][kOuts / 8][4];
  int stage = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < s.tiles; tile += static_cast<int>(gridDim.x)) {
    DZ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      DZ_UNROLL
      for (int n = 0; n < kOuts / 8; ++n) sum[r][n][0] = sum[r][n][1] = sum[r][n][2] = sum[r][n][3] = 0.0f;
    }
    for (int slice = 0; slice < slices; ++slice) {
      wait_for_copies<Block::kStages - 2>();
      __syncthreads();
      copy_next();  // into the patch that all warps have finished reading
      const uint32_t used = static_cast<uint32_t>(stage) * patch_bytes;
      const uint32_t terms = static_cast<uint32_t>(slice) * (kTaps * Block::kUnits * 16);
      if (++stage == Block::kStages) stage = 0;
      if (warp * kRows * 16 >= count) continue;
      DZ_UNROLL
      for (int tap = 0; tap < kTaps; ++tap) {
        const uint32_t corner = used + static_cast<uint32_t>(tap / 3) * row_bytes + column_bytes[tap % 3];
        DZ_UNROLL
        for (int k = 0; k < Block::kDepth; ++k) {
          uint32_t a[kRows][Block::kParts][4];
          DZ_UNROLL
          for (int r = 0; r < kRows; ++r) {
            load_matrices(a[r][0], pixel_at[r] + corner + static_cast<uint32_t>(32 * k));
            split(a[r]);
          }
          DZ_UNROLL
          for (int n = 0; n < kOuts / 16; ++n) {
            uint32_t b[Block::kParts][4];
            load_matrices(b[0], weight_at[n] + terms + static_cast<uint32_t>(32 * (tap * Block::kDepth + k)));
            split(b);
            DZ_UNROLL
            for (int r = 0; r < kRows; ++r) {
              multiply(sum[r][2 * n], a[r], b, 0);
              multiply(sum[r][2 * n + 1], a[r], b, 2);
            }
          }
        }
      }
    }
    const ConvTile at = tile_at(s, tile);
    const int64_t images = s.images - at.image;
    T* to = out + ((at.image * s.Ho + at.row) * s.Wo + at.column) * s.O + first + lane % 4 * 2 * kRun;
    DZ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      DZ_UNROLL
      for (int half = 0; half < 2; ++half) {
        const ConvPixel pixel = pixels[(warp * kRows + r) * 16 + half * 8 + lane / 4];
        if (pixel.image >= images || pixel.image == INT16_MAX || pixel.row >= s.Ho - at.row ||
            pixel.column >= s.Wo - at.column) {
          continue;
        }
        DZ_UNROLL
        for (int run = 0; run < kOuts / (8 * kRun); ++run) {
          uint32_t words[kRun * static_cast<int>(sizeof(T)) / 2];
          DZ_UNROLL
          for (int i = 0; i < kRun; ++i) {
            const float low = sum[r][run * kRun + i][2 * half], high = sum[r][run * kRun + i][2 * half + 1];
            if constexpr (sizeof(T) == 4) {
              words[2 * i] = as_bits(low), words[2 * i + 1] = as_bits(high);
            } else {
              words[i] = round_to_bfloat16(low, high);
            }
          }
          store_words(to + static_cast<int64_t>(pixel.offset) * s.O + run * 8 * kRun, words);
        }
      }
    }
  }
}

// Chooses the tile: at most kTilePixels pixels, halved until a block's shared memory fits into `limit` bytes. Returns a
// score, the outputs of a tile times the warps it occupies (up to 4), or 0 if nothing fits.
template <typename Block>
int64_t plan(DenseConv2d& s, int64_t limit) {
  s.tile_w = divide_up(s.Wo, divide_up(s.Wo, 64));
  s.tile_h = s.Ho < kTilePixels / s.tile_w ? s.Ho : kTilePixels / s.tile_w;
  s.tile_h = divide_up(s.Ho, divide_up(s.Ho, s.tile_h));
  const int64_t together = kTilePixels / (s.tile_h * s.tile_w);
  const bool complete = s.tile_h == s.Ho && s.tile_w == s.Wo;
  s.tile_images = complete ? static_cast<int>(together < s.images ? together : s.images) : 1;
  for (;;) {
    s.patch_h = (s.tile_h - 1) * s.stride_h + 3;
    s.patch_w = (s.tile_w - 1) * s.stride_w + 3;
    s.shared = static_cast<int64_t>(kTilePixels * sizeof(ConvPixel)) + Block::kOuts * Block::weight_pitch(s.C) +
               Block::kStages * Block::patch_bytes(s);
    s.down = divide_up(s.Ho, s.tile_h), s.across = divide_up(s.Wo, s.tile_w);
    const int64_t tiles = (s.images + s.tile_images - 1) / s.tile_images * s.down * s.across;
    if (tiles > kMaxTiles) return 0;
    s.tiles = static_cast<int>(tiles);
    if (s.shared <= limit) {
      const int pixels = s.tile_images * s.tile_h * s.tile_w, busy = divide_up(pixels, 16 * Block::kRows);
      return static_cast<int64_t>(pixels) * Block::kOuts * (busy < 4 ? busy : 4);
    }
    int& extent = s.tile_images > 1 ? s.tile_images : s.tile_h > 1 ? s.tile_h : s.tile_w;
    if (extent == 1) return 0;
    extent = divide_up(extent, 2);
  }
}

// Plans `s` and calls run(Block) with the block of the best score; among equals the one with most output channels,
// which reads the input least often. Returns false if no block fits.
template <typename T, int BYTES, typename Run>
bool with_block(DenseConv2d& s, int64_t limit, Run run) {
  DenseConv2d plan_64 = s, plan_32 = s, plan_16 = s;
  const int64_t score_64 = s.O % 64 == 0 ? plan<ConvBlock<T, BYTES, 64>>(plan_64, limit) : 0;
  const int64_t score_32 = s.O % 32 == 0 ? plan<ConvBlock<T, BYTES, 32>>(plan_32, limit) : 0;
  const int64_t score_16 = s.O % 16 == 0 ? plan<ConvBlock<T, BYTES, 16>>(plan_16, limit) : 0;
  if (score_64 == 0 && score_32 == 0 && score_16 == 0) return false;
  if (score_64 >= score_32 && score_64 >= score_16) {
    s = plan_64;
    run(ConvBlock<T, BYTES, 64>());
  } else if (score_32 >= score_16) {
    s = plan_32;
    run(ConvBlock<T, BYTES, 32>());
  } else {
    s = plan_16;
    run(ConvBlock<T, BYTES, 16>());
  }
  return true;
}

template <typename Run>
bool with_block(DenseConv2d& s, bool half, int64_t limit, Run run) {
  if (s.C % 16 != 0) return false;
  if (!half) return with_block<float, 64>(s, limit, run);
  return s.C % 32 == 0 ? with_block<bfloat16, 64>(s, limit, run) : with_block<bfloat16, 32>(s, limit, run);
}

}  // namespace dz

// Returns cudaErrorInvalidValue if no block fits.
DZ_EXPORT int dz_dense_conv2d(const void* delta, const void* weight, void* out, int64_t half, int64_t images, int64_t H,
                              int64_t W, int64_t C, int64_t Ho, int64_t Wo, int64_t O, int64_t stride_h,
                              int64_t stride_w, int64_t pad_h, int64_t pad_w, cudaStream_t stream) {
  int device = 0, limit = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const auto to_int = [](int64_t value) { return static_cast<int>(value); };
  dz::DenseConv2d s{};
  s.images = images, s.H = to_int(H), s.W = to_int(W), s.C = to_int(C), s.Ho = to_int(Ho), s.Wo = to_int(Wo);
  s.O = to_int(O), s.stride_h = to_int(stride_h), s.stride_w = to_int(stride_w);
  s.pad_h = to_int(pad_h), s.pad_w = to_int(pad_w);
  const auto run = [&](auto block) {
    using Block = decltype(block);
    using T = typename Block::Type;
    const auto kernel = dz::dense_conv2d_kernel<Block>;
    const size_t shared = static_cast<size_t>(s.shared);
    int resident = 0;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, to_int(s.shared));
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, Block::kThreads, shared);
    }
    if (error != cudaSuccess) return;
    const int64_t groups = O / Block::kOuts,
                  max_blocks = (static_cast<int64_t>(resident) * processors + groups - 1) / groups;
    const dim3 grid(static_cast<unsigned>(s.tiles < max_blocks ? s.tiles : max_blocks), static_cast<unsigned>(groups));
    error = dz::launch(kernel, grid, Block::kThreads, shared, stream, static_cast<const T*>(delta),
                       static_cast<const T*>(weight), static_cast<T*>(out), s);
  };
  return dz::with_block(s, half != 0, limit, run) ? error : cudaErrorInvalidValue;
}
