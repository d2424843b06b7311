#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/masking.h"
#include "cuda/patches.h"
#include "philox.h"
#include "ranking.h"

namespace hsv::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 32;  // patches of the output that one block of the scatter writes

__device__ unsigned before(int lane) {
  return (1u << lane) - 1;
}

// One image per warp, its keys in registers: at most 32 * KEYS patches.
template <int KEYS>
__global__ void __launch_bounds__(kThreads)
    rank_in_registers(const int64_t* seed, const int64_t* offset, uint32_t first_index, int64_t B, int64_t L, int64_t K,
                      int64_t* ids_keep, int64_t* ids_restore, float* mask) {
  const int lane = threadIdx.x % 32;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (b >= B) return;  // a whole warp
  uint32_t keys[KEYS];
#pragma unroll
  for (int r = 0; r < KEYS; r++)
    keys[r] = masking_key(static_cast<uint64_t>(*seed), static_cast<uint64_t>(*offset),
                          first_index + static_cast<uint32_t>(b), 32 * r + lane);

  const Rank rank = rank_of(K, [&](uint32_t key) {
    unsigned below = 0;
#pragma unroll
    for (int r = 0; r < KEYS; r++) below += 32 * r + lane < L && keys[r] < key;
    return static_cast<int64_t>(__reduce_add_sync(kAll, below));
  });

  int64_t kept = 0, ties = 0;
#pragma unroll
  for (int r = 0; r < KEYS; r++) {
    const int64_t l = 32 * r + lane;
    const unsigned equal = __ballot_sync(kAll, l < L && keys[r] == rank.key);
    const bool chosen = l < L && is_kept(keys[r], ties + __popc(equal & before(lane)), rank);
    const unsigned all = __ballot_sync(kAll, chosen);
    const int64_t place = kept + __popc(all & before(lane));
    ties += __popc(equal);
    kept += __popc(all);
    if (chosen) ids_keep[b * K + place] = l;
    if (l < L) ids_restore[b * L + l] = chosen ? place : K + l - place;
    if (l < L) mask[b * L + l] = chosen ? 0.0f : 1.0f;
  }
}

// Number of set flags among the threads before this one; `total` becomes that of the block. All threads must call it.
__device__ int count_before(bool flag, int* warps, int* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned set = __ballot_sync(kAll, flag);
  if (lane == 0) warps[warp] = __popc(set);
  __syncthreads();
  int count = __popc(set & before(lane));
  *total = 0;
  for (int w = 0; w < kWarps; w++) {
    count += w < warp ? warps[w] : 0;
    *total += warps[w];
  }
  __syncthreads();
  return count;
}

// One image per block, of any number of patches: the keys wait in ids_restore, where each thread reads back only what
// it wrote itself.
__global__ void __launch_bounds__(kThreads)
    rank_in_memory(const int64_t* seed, const int64_t* offset, uint32_t first_index, int64_t B, int64_t L, int64_t K,
                   int64_t* ids_keep, int64_t* ids_restore, float* mask) {
  __shared__ int warps[kWarps];
  const int64_t rounds = (L + kThreads - 1) / kThreads;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    int64_t *const keep = ids_keep + b * K, *const keys = ids_restore + b * L;
    const uint32_t image = first_index + static_cast<uint32_t>(b);
    for (int64_t l = threadIdx.x; l < L; l += kThreads)
      keys[l] =
          masking_key(static_cast<uint64_t>(*seed), static_cast<uint64_t>(*offset), image, static_cast<uint32_t>(l));

    const Rank rank = rank_of(K, [&](uint32_t key) {
      int64_t below = 0;
      for (int64_t r = 0; r < rounds; r++) {
        const int64_t l = r * kThreads + threadIdx.x;
        below += __syncthreads_count(l < L && keys[l] < key);
      }
      return below;
    });

    int64_t kept = 0, ties = 0;
    for (int64_t r = 0; r < rounds; r++) {
      const int64_t l = r * kThreads + threadIdx.x;
      int of_block;
      const uint32_t key = l < L ? static_cast<uint32_t>(keys[l]) : 0;
      const int64_t ties_before = ties + count_before(l < L && key == rank.key, warps, &of_block);
      ties += of_block;
      const bool chosen = l < L && is_kept(key, ties_before, rank);
      const int64_t place = kept + count_before(chosen, warps, &of_block);
      kept += of_block;
      if (l >= L) continue;
      if (chosen) keep[place] = l;
      keys[l] = chosen ? place : K + l - place;
      mask[b * L + l] = chosen ? 0.0f : 1.0f;
    }
  }
}

// A thread reads its groups before it writes the first. Four blocks to a multiprocessor leave it 64 registers, which is
// enough for them.
template <class T, int I, int V>
__global__ void __launch_bounds__(kThreads, 4)
    gather_kernel(const T* __restrict__ source, Layout from, Ids ids, int64_t B, uint32_t N, int64_t count,
                  const T* __restrict__ fill, T* __restrict__ out) {
  constexpr int kGroups = kInFlight<I>;
  __shared__ alignas(kWidest) unsigned char staging[I == 1 ? 1 : kThreads * sizeof(Group<T, I, V>)];
  auto* const stage = reinterpret_cast<Group<T, I, V>*>(staging) + threadIdx.x / 32 * 32;
  const int lane = threadIdx.x % 32;
  const uint32_t groups = from.values / (I * V);
  const int64_t total = B * N * groups, step = static_cast<int64_t>(gridDim.x) * kThreads * kGroups;

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kGroups; first < total; first += step) {
    const Spot start = spot_of(first, groups, N);
    Group<T, I, V> moved[kGroups];
#pragma unroll
    for (int j = 0; j < kGroups; j++) {
      const uint32_t local = j * kThreads + threadIdx.x;
      if (first + local < total)
        moved[j] = gathered<T, I, V>(source, from, ids, count, fill, spot_after(start, local, groups, N));
    }
#pragma unroll
    for (int j = 0; j < kGroups; j++) {
      const int64_t of_warp = first + j * kThreads + threadIdx.x - lane;
      if constexpr (I == 1) {
        if (of_warp + lane < total) store_planes<T, I, V>(out + (of_warp + lane) * V, 0, moved[j]);
      } else {
        stage[lane] = moved[j];
        __syncwarp();
        store_staged<T, I, V>(stage, lane, total - of_warp, out + of_warp * (I * V));
        __syncwarp();
      }
    }
  }
}

// One block writes kRows patches of one sample; it first looks up which rows of grad were taken from them.
template <class T, int I, int V>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(Rows<const T> grad, Ids ids, int64_t B, int64_t N, int64_t L, T* __restrict__ out, Layout to) {
  __shared__ int64_t sources[kRows];
  const uint32_t groups = to.values / (I * V);
  const int64_t blocks = (L + kRows - 1) / kRows;
  for (int64_t i = blockIdx.x; i < B * blocks; i += gridDim.x) {
    const int64_t b = i / blocks, first = i % blocks * kRows;
    const int64_t rows = L - first < kRows ? L - first : kRows;
    if (threadIdx.x < kRows) sources[threadIdx.x] = -1;
    __syncthreads();
    for (int64_t n = threadIdx.x; n < N; n += kThreads) {
      const int64_t row = ids.data[b * ids.batch + n * ids.column] - first;
      if (row >= 0 && row < rows) sources[row] = n;
    }
    __syncthreads();
#pragma unroll 4
    for (uint32_t e = threadIdx.x; e < rows * groups; e += kThreads) {
      const uint32_t row = e / groups, group = e % groups;
      Group<T, I, V> packed = {};
      if (sources[row] >= 0) packed = load_packed<I, V>(grad, Spot{b, static_cast<uint32_t>(sources[row]), group});
      const int64_t place = offset_of<I, V>(to, Spot{b, static_cast<uint32_t>(first) + row, group});
      store_planes<T, I, V>(out + place, to.at.channel, separate(packed));
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    masked_sum_kernel(Rows<const T> grad, Ids ids, int64_t B, int64_t L, int64_t K, int64_t D, float* partial) {
  const int64_t parts = (D + kThreads - 1) / kThreads;
  for (int64_t i = blockIdx.x; i < B * parts; i += gridDim.x) {
    const int64_t b = i / parts, d = i % parts * kThreads + threadIdx.x;
    if (d >= D) continue;
    float sum = 0;
#pragma unroll 8
    for (int64_t l = 0; l < L; l++)
      if (ids.data[b * ids.batch + l * ids.column] >= K)
        sum += widen(grad.data[b * grad.batch + l * grad.row + d * grad.value]);
    partial[b * D + d] = sum;
  }
}

// Calls run with the constants I and V: three planes or one, the widest access or one value at a time.
template <class T, class F>
void with_groups(const Layout& layout, const F& run) {
  constexpr int kWide = kWidest / sizeof(T);
  const auto planes = [&](auto V) {
    layout.planes == 3 ? run(std::integral_constant<int, 3>{}, V) : run(std::integral_constant<int, 1>{}, V);
  };
  layout.wide ? planes(std::integral_constant<int, kWide>{}) : planes(std::integral_constant<int, 1>{});
}

// Elements are moved and never computed with, so integers of their size stand for every type.
template <class F>
void with_element(int element_size, const F& run) {
  element_size == 2 ? run(uint16_t{}) : run(uint32_t{});
}

}  // namespace

void random_masking(Stream on, const int64_t* seed, const int64_t* offset, uint32_t first_index, int64_t B, int64_t L,
                    int64_t K, int64_t* ids_keep, int64_t* ids_restore, float* mask) {
  launch(on, "random_masking", [&](cudaStream_t stream) {
    const auto run = [&](auto* kernel, int64_t blocks) {
      kernel<<<blocks, kThreads, 0, stream>>>(seed, offset, first_index, B, L, K, ids_keep, ids_restore, mask);
    };
    const int64_t warps = (B + kWarps - 1) / kWarps;
    if (L <= 256) return run(rank_in_registers<8>, warps);
    if (L <= 1024) return run(rank_in_registers<32>, warps);
    run(rank_in_memory, grid(B, 1));
  });
}

void gather(Stream on, int element_size, const void* source, Patches from, const void* fill, Ids ids, int64_t B,
            int64_t N, int64_t count, PatchShape shape, void* out) {
  with_element(element_size, [&](auto zero) {
    using T = decltype(zero);
    Layout layout = layout_of(from, shape, sizeof(T), reinterpret_cast<uintptr_t>(source), kWidest / sizeof(T));
    layout.wide &= reinterpret_cast<uintptr_t>(fill) % kWidest == 0;
    with_groups<T>(layout, [&](auto I, auto V) {
      const int64_t groups = B * N * (layout.values / (I * V));
      launch(on, "gather", [&](cudaStream_t stream) {
        gather_kernel<T, I, V><<<grid(groups, kThreads * kInFlight<I>), kThreads, 0, stream>>>(
            static_cast<const T*>(source), layout, ids, B, static_cast<uint32_t>(N), count, static_cast<const T*>(fill),
            static_cast<T*>(out));
      });
    });
  });
}

void scatter(Stream on, int element_size, const void* grad, int64_t batch, int64_t row, int64_t value, Ids ids,
             int64_t B, int64_t N, int64_t L, PatchShape shape, void* out, Patches to) {
  with_element(element_size, [&](auto zero) {
    using T = decltype(zero);
    const Rows<const T> rows = {static_cast<const T*>(grad), batch, row, value};
    Layout layout = layout_of(to, shape, sizeof(T), reinterpret_cast<uintptr_t>(out), kWidest / sizeof(T));
    layout.wide &= is_wide(rows, kWidest / sizeof(T));
    with_groups<T>(layout, [&](auto I, auto V) {
      launch(on, "scatter", [&](cudaStream_t stream) {
        scatter_kernel<T, I, V><<<grid(B * ((L + kRows - 1) / kRows), 1), kThreads, 0, stream>>>(
            rows, ids, B, N, L, static_cast<T*>(out), layout);
      });
    });
  });
}

void masked_sum(Stream on, DType dtype, const void* grad, int64_t batch, int64_t row, int64_t value, Ids ids, int64_t B,
                int64_t L, int64_t K, int64_t D, float* partial) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch(on, "masked_sum", [&](cudaStream_t stream) {
      masked_sum_kernel<T><<<grid(B * ((D + kThreads - 1) / kThreads), 1), kThreads, 0, stream>>>(
          {static_cast<const T*>(grad), batch, row, value}, ids, B, L, K, D, partial);
    });
  };
  switch (dtype) {
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat16:
      return run(Float16{});
    default:
      return run(0.0f);
  }
}

}  // namespace hsv::cuda
