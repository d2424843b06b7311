#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/masking.h"
#include "philox.h"

namespace hsv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 32;             // patches of the output that one block of the scatter writes
constexpr int64_t kBlocks = 1 << 20;  // at most; blocks walk over what is left

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("hsv ") + what + ": " + cudaGetErrorString(error));
}

// Makes the tensors' device current for one launch, and the caller's again afterwards.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cannot use CUDA");
    check(cudaSetDevice(device), "cannot use the CUDA device");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

int grid(int64_t blocks) {
  return static_cast<int>(blocks < kBlocks ? blocks : kBlocks);
}

// Number of set flags among the threads before this one; `total` becomes that of the block. All threads must call it.
__device__ int count_before(bool flag, int* warps, int* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned set = __ballot_sync(0xffffffffu, flag);
  if (lane == 0) warps[warp] = __popc(set);
  __syncthreads();
  int before = __popc(set & ((1u << lane) - 1));
  *total = 0;
  for (int w = 0; w < kThreads / 32; w++) {
    before += w < warp ? warps[w] : 0;
    *total += warps[w];
  }
  __syncthreads();
  return before;
}

// One image per block. The K-th smallest key is found bit by bit, from the highest; the keys wait in ids_restore, where
// each thread reads back only what it wrote itself.
__global__ void __launch_bounds__(kThreads)
    random_masking_kernel(const int64_t* seed, const int64_t* offset, uint32_t first_index, int64_t B, int64_t L,
                          int64_t K, int64_t* ids_keep, int64_t* ids_restore, float* mask) {
  __shared__ int warps[kThreads / 32];
  const int64_t rounds = (L + kThreads - 1) / kThreads;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    int64_t *const keep = ids_keep + b * K, *const keys = ids_restore + b * L;
    const uint32_t image = first_index + static_cast<uint32_t>(b);
    for (int64_t l = threadIdx.x; l < L; l += kThreads)
      keys[l] =
          masking_key(static_cast<uint64_t>(*seed), static_cast<uint64_t>(*offset), image, static_cast<uint32_t>(l));

    int64_t threshold = 0, ties = K;
    for (int64_t bit = int64_t{1} << 31; bit > 0; bit >>= 1) {
      int64_t below = 0;
      for (int64_t r = 0; r < rounds; r++) {
        const int64_t l = r * kThreads + threadIdx.x;
        below += __syncthreads_count(l < L && keys[l] < (threshold | bit));
      }
      if (below < K) {
        threshold |= bit;
        ties = K - below;
      }
    }

    int64_t kept = 0, tied = 0;
    for (int64_t r = 0; r < rounds; r++) {
      const int64_t l = r * kThreads + threadIdx.x;
      int of_block;
      const bool tie = l < L && keys[l] == threshold;
      const int64_t tie_place = tied + count_before(tie, warps, &of_block);
      tied += of_block;
      const bool chosen = l < L && (keys[l] < threshold || (tie && tie_place < ties));
      const int64_t place = kept + count_before(chosen, warps, &of_block);
      kept += of_block;
      if (l >= L) continue;
      if (chosen) keep[place] = l;
      keys[l] = chosen ? place : K + l - place;
      mask[b * L + l] = chosen ? 0.0f : 1.0f;
    }
  }
}

__device__ int64_t corner(const Patches& p, int64_t patch) {
  return patch / p.grid_width * p.grid_row + patch % p.grid_width * p.grid_column;
}

template <class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(const T* __restrict__ source, Patches from, Ids ids,
                                                          int64_t B, int64_t N, PatchShape shape, T* __restrict__ out) {
  const int64_t C = shape.channels, size = shape.height * shape.width * C;
  for (int64_t row = blockIdx.x; row < B * N; row += gridDim.x) {
    const int64_t b = row / N, id = ids.data[b * ids.batch + row % N * ids.column];
    const T* const patch = source + b * from.batch + corner(from, id);
    for (int64_t e = threadIdx.x; e < size; e += kThreads) {
      const int64_t pixel = e / C, y = pixel / shape.width, x = pixel % shape.width;
      out[row * size + e] = patch[y * from.row + x * from.column + e % C * from.channel];
    }
  }
}

// One block writes kRows patches of one sample; it first looks up which rows of grad were taken from them. Values are
// visited in the order in which `to` holds them: plane by plane for images, channel last for tokens.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const T* __restrict__ grad, Patches from, Ids ids, int64_t B, int64_t N, int64_t L, PatchShape shape,
                   T* __restrict__ out, Patches to) {
  __shared__ int64_t sources[kRows];
  const int64_t C = shape.channels, pixels = shape.height * shape.width, blocks = (L + kRows - 1) / kRows;
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
    for (int64_t r = 0; r < rows; r++) {
      const T* const patch = grad + b * from.batch + sources[r] * from.grid_row;
      T* const place = out + b * to.batch + corner(to, first + r);
      for (int64_t e = threadIdx.x; e < pixels * C; e += kThreads) {
        const int64_t pixel = to.channel == 1 ? e / C : e % pixels, c = to.channel == 1 ? e % C : e / pixels;
        const int64_t y = pixel / shape.width, x = pixel % shape.width;
        const bool taken = sources[r] >= 0;
        place[y * to.row + x * to.column + c * to.channel] =
            taken ? patch[y * from.row + x * from.column + c * from.channel] : T{};
      }
    }
    __syncthreads();
  }
}

template <class F>
void launch(Queue queue, const char* what, const F& kernel) {
  const OnDevice on(queue.device);
  kernel(reinterpret_cast<cudaStream_t>(queue.stream));
  check(cudaGetLastError(), what);
}

}  // namespace

void random_masking(Queue queue, const int64_t* seed, const int64_t* offset, uint32_t first_index, int64_t B, int64_t L,
                    int64_t K, int64_t* ids_keep, int64_t* ids_restore, float* mask) {
  launch(queue, "random_masking", [&](cudaStream_t stream) {
    random_masking_kernel<<<grid(B), kThreads, 0, stream>>>(seed, offset, first_index, B, L, K, ids_keep, ids_restore,
                                                            mask);
  });
}

void gather(Queue queue, int element_size, const void* source, Patches from, Ids ids, int64_t B, int64_t N,
            PatchShape shape, void* out) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch(queue, "gather", [&](cudaStream_t stream) {
      gather_kernel<<<grid(B * N), kThreads, 0, stream>>>(static_cast<const T*>(source), from, ids, B, N, shape,
                                                          static_cast<T*>(out));
    });
  };
  element_size == 2 ? run(uint16_t{}) : run(uint32_t{});
}

void scatter(Queue queue, int element_size, const void* grad, Patches from, Ids ids, int64_t B, int64_t N, int64_t L,
             PatchShape shape, void* out, Patches to) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch(queue, "scatter", [&](cudaStream_t stream) {
      scatter_kernel<<<grid(B * ((L + kRows - 1) / kRows)), kThreads, 0, stream>>>(
          static_cast<const T*>(grad), from, ids, B, N, L, shape, static_cast<T*>(out), to);
    });
  };
  element_size == 2 ? run(uint16_t{}) : run(uint32_t{});
}

}  // namespace hsv::cuda
