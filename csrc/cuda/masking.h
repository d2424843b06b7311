// Random masking and rows of patches or tokens moved on a CUDA device; the definitions are those of cpu/masking.h.
#pragma once

#include <stdint.h>

#include "cpu/masking.h"
#include "cuda/stream.h"

namespace hsv::cuda {

// seed and offset are read on the device. ids_keep [B, K], ids_restore [B, L] and mask [B, L] are contiguous.
void random_masking(Stream on, const int64_t* seed, const int64_t* offset, uint32_t first_index, int64_t B, int64_t L,
                    int64_t K, int64_t* ids_keep, int64_t* ids_restore, float* mask);

// out[b, n] = patch ids[b, n] of source[b] if that number is below `count`, else `fill`, in (y, x, c) order; out is
// contiguous. fill is one contiguous row, or null if no number reaches `count`. Elements have 2 or 4 bytes.
void gather(Stream on, int element_size, const void* source, Patches from, const void* fill, Ids ids, int64_t B,
            int64_t N, int64_t count, PatchShape shape, void* out);

// Patch l of out[b] is row n of grad[b] where ids[b, n] = l, zeros where there is none; every patch is written once.
// grad is [B, N, values] with strides.
void scatter(Stream on, int element_size, const void* grad, int64_t batch, int64_t row, int64_t value, Ids ids,
             int64_t B, int64_t N, int64_t L, PatchShape shape, void* out, Patches to);

// partial [B, D] float32, contiguous: Σ_l grad[b, l] over the rows with ids[b, l] >= K, in the order of l.
// dtype is not kFloat64.
void masked_sum(Stream on, DType dtype, const void* grad, int64_t batch, int64_t row, int64_t value, Ids ids, int64_t B,
                int64_t L, int64_t K, int64_t D, float* partial);

}  // namespace hsv::cuda
