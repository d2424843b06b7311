// Random masking, and rows of patches or tokens moved to other places.
//
// Patches are addressed by seven numbers, so that images and token sequences of any strides share the kernels:
// element (y, x, c) of patch l of sample b lies at
//   b * batch + (l / grid_width) * grid_row + (l % grid_width) * grid_column + y * row + x * column + c * channel.
#pragma once

#include <stdint.h>

#include "cpu/elements.h"

namespace hsv {

// Strides count elements.
struct Patches {
  int64_t batch, grid_width, grid_row, grid_column, row, column, channel;
};

struct PatchShape {
  int64_t height, width, channels;
};

// ids[b * batch + n * column].
struct Ids {
  const int64_t* data;
  int64_t batch, column;
};

struct MaskingKernels {
  // ids_keep [B, K], ids_restore [B, L] and mask [B, L], contiguous; keys is scratch of `threads` * 2 * L words.
  void (*random_masking)(uint64_t seed, uint64_t offset, uint32_t first_index, int64_t B, int64_t L, int64_t K,
                         int64_t* ids_keep, int64_t* ids_restore, float* mask, uint32_t* keys, int threads);

  // table[b, ids[b, n]] = n for ids below M; N where there is none. table is [B, M], contiguous.
  // False if an id lies outside [0, limit) or comes twice.
  bool (*invert)(Ids ids, int64_t B, int64_t N, int64_t M, int64_t limit, int64_t* table, int threads);

  // Row n of out[b] is row ids[b, n] of source[b] if that is below `count`, `fill` (zeros if null) if it is below
  // `limit`. Elements have 2, 4 or 8 bytes. False if an id lies outside [0, limit).
  bool (*gather)(int element_size, const void* source, Patches from, const void* fill, Ids ids, int64_t B, int64_t N,
                 int64_t count, int64_t limit, PatchShape shape, void* out, Patches to, int threads);

  // sum [D] = Σ grad[b, l] over the rows with ids[b, l] >= K, added in an order that B alone decides. sum and partial
  // [128, D] are double for kFloat64 and float for every other.
  void (*masked_sum)(DType dtype, const void* grad, int64_t batch, int64_t row, int64_t column, Ids ids, int64_t B,
                     int64_t L, int64_t K, int64_t D, void* partial, void* sum, int threads);
};

#ifdef HSV_ISA
namespace HSV_ISA {
MaskingKernels masking_kernels();
}
#endif

}  // namespace hsv
