// Random masking and gathers of patches on a CUDA device; the definitions are those of cpu/masking.h.
//
// Pointers are device pointers of `device`; work is queued on `stream` and not waited for. Each function throws
// std::runtime_error, with CUDA's reason, if the launch fails: without a driver, for instance.
#pragma once

#include <stdint.h>

#include "cpu/masking.h"

namespace hsv::cuda {

struct Queue {
  int device;
  uintptr_t stream;
};

// seed and offset are read on the device. ids_keep [B, K], ids_restore [B, L] and mask [B, L] are contiguous.
void random_masking(Queue queue, const int64_t* seed, const int64_t* offset, uint32_t first_index, int64_t B, int64_t L,
                    int64_t K, int64_t* ids_keep, int64_t* ids_restore, float* mask);

// out[b, n] = patch ids[b, n] of source[b], in (y, x, c) order; out is contiguous. Elements have 2 or 4 bytes.
void gather(Queue queue, int element_size, const void* source, Patches from, Ids ids, int64_t B, int64_t N,
            PatchShape shape, void* out);

// Patch l of out[b] is row n of grad[b] where ids[b, n] = l, zeros where there is none; every patch is written once.
void scatter(Queue queue, int element_size, const void* grad, Patches from, Ids ids, int64_t B, int64_t N, int64_t L,
             PatchShape shape, void* out, Patches to);

}  // namespace hsv::cuda
