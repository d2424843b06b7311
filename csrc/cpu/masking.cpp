#include "cpu/masking.h"

#include "cpu/element_vectors.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "philox.h"

namespace hsv::HSV_ISA {
namespace {

constexpr int64_t kBytesPerThread = 1 << 16;  // less than this does not pay for waking a thread
constexpr int64_t kGroups = 64;               // of samples, each with a sum of its own of the mask token's gradient

struct Threshold {
  uint32_t key;
  int64_t ties;  // how many patches of exactly this key are kept
};

// The K-th smallest of L keys: one byte at a time, from the highest, the candidates shrink to the bin that holds it.
Threshold find_threshold(const uint32_t* keys, int64_t L, int64_t K, uint32_t* candidates) {
  int64_t wanted = K;
  for (int shift = 24;; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < L; i++) counts[keys[i] >> shift & 255]++;
    uint32_t bin = 0;
    while (counts[bin] < wanted) wanted -= counts[bin++];

    int64_t left = 0;
    for (int64_t i = 0; i < L; i++) {
      const uint32_t key = keys[i];
      candidates[left] = key;  // in place after the first round: left <= i
      left += (key >> shift & 255) == bin;
    }
    if (left == 1 || shift == 0) return {candidates[0], wanted};
    keys = candidates;
    L = left;
  }
}

// Without branches, which chance would make the processor guess wrong: `chosen` takes each l, and keeps its place if l
// is kept.
void mask_image(const uint32_t* keys, int64_t L, int64_t K, Threshold threshold, uint32_t* chosen, int64_t* ids_keep,
                int64_t* ids_restore, float* mask) {
  int64_t kept = 0, ties = threshold.ties;
  for (int64_t l = 0; l < L; l++) {
    const bool tie = (keys[l] == threshold.key) & (ties > 0);
    const bool keep = (keys[l] < threshold.key) | tie;
    ids_restore[l] = keep ? kept : K + l - kept;
    mask[l] = static_cast<float>(!keep);
    chosen[kept] = static_cast<uint32_t>(l);
    ties -= tie;
    kept += keep;
  }
  for (int64_t k = 0; k < K; k++) ids_keep[k] = chosen[k];
}

void random_masking(uint64_t seed, uint64_t offset, uint32_t first_index, int64_t B, int64_t L, int64_t K,
                    int64_t* ids_keep, int64_t* ids_restore, float* mask, uint32_t* keys, int threads) {
  const int most = static_cast<int>(B < threads ? B : useful_threads(B * L * 64, kBytesPerThread, threads));
  parallel(most, [&](int thread, int team) {
    uint32_t* const own = keys + 2 * L * thread;
    for (int64_t b = B * thread / team; b < B * (thread + 1) / team; b++) {
      const uint32_t image = first_index + static_cast<uint32_t>(b);
      for (int64_t l = 0; l < L; l++) own[l] = masking_key(seed, offset, image, static_cast<uint32_t>(l));
      const Threshold threshold = find_threshold(own, L, K, own + L);
      mask_image(own, L, K, threshold, own + L, ids_keep + b * K, ids_restore + b * L, mask + b * L);
    }
  });
}

bool invert(Ids ids, int64_t B, int64_t N, int64_t M, int64_t limit, int64_t* table, int threads) {
  bool right = true;
  parallel_for(B, useful_threads(B * (N + M) * 8, kBytesPerThread, threads), [&](int64_t begin, int64_t end) {
    bool all = true;
    for (int64_t b = begin; b < end; b++) {
      int64_t* const places = table + b * M;
      for (int64_t m = 0; m < M; m++) places[m] = N;
      for (int64_t n = 0; n < N; n++) {
        const int64_t id = ids.data[b * ids.batch + n * ids.column];
        all &= id >= 0 && id < limit;
        if (id < 0 || id >= M) continue;
        all &= places[id] == N;
        places[id] = n;
      }
    }
    if (!all) __atomic_store_n(&right, false, __ATOMIC_RELAXED);
  });
  return right;
}

// One patch, C planes to or from interleaved pixels; C is a constant so that the compiler turns it into shuffles.
template <int C, class T>
void interleave(const T* __restrict from, int64_t plane, T* __restrict to, int64_t width) {
  for (int64_t x = 0; x < width; x++)
    for (int c = 0; c < C; c++) to[x * C + c] = from[c * plane + x];
}

template <int C, class T>
void separate(const T* __restrict from, T* __restrict to, int64_t plane, int64_t width) {
  for (int64_t x = 0; x < width; x++)
    for (int c = 0; c < C; c++) to[c * plane + x] = from[x * C + c];
}

template <class T>
void copy_patch(const T* source, const Patches& from, T* out, const Patches& to, const PatchShape& shape) {
  const int64_t C = shape.channels, W = shape.width;
  const bool pixels_in = from.channel == 1 && (from.column == C || W == 1);
  const bool pixels_out = to.channel == 1 && (to.column == C || W == 1);
  for (int64_t y = 0; y < shape.height; y++, source += from.row, out += to.row) {
    if (pixels_in && pixels_out) {
      memcpy(out, source, static_cast<size_t>(W * C) * sizeof(T));
    } else if (C == 3 && from.column == 1 && pixels_out) {
      interleave<3>(source, from.channel, out, W);
    } else if (C == 3 && to.column == 1 && pixels_in) {
      separate<3>(source, out, to.channel, W);
    } else {
      for (int64_t x = 0; x < W; x++)
        for (int64_t c = 0; c < C; c++)
          out[x * to.column + c * to.channel] = source[x * from.column + c * from.channel];
    }
  }
}

template <class T>
void zero_patch(T* out, const Patches& to, const PatchShape& shape) {
  const int64_t C = shape.channels, W = shape.width;
  for (int64_t y = 0; y < shape.height; y++, out += to.row) {
    if (to.channel == 1 && (to.column == C || W == 1)) {
      memset(out, 0, static_cast<size_t>(W * C) * sizeof(T));
    } else {
      for (int64_t c = 0; c < C; c++)
        for (int64_t x = 0; x < W; x++) out[x * to.column + c * to.channel] = T{};
    }
  }
}

template <class T>
bool gather_rows(const T* source, Patches from, const T* fill, Ids ids, int64_t B, int64_t N, int64_t count,
                 int64_t limit, PatchShape shape, T* out, Patches to, int threads) {
  const Patches packed = {0, 1, 0, 0, shape.width * shape.channels, shape.channels, 1};
  const int64_t bytes = B * N * shape.height * shape.width * shape.channels * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(out, bytes);
  bool right = true;
  parallel_for(B * N, useful_threads(bytes, kBytesPerThread, threads), [&](int64_t begin, int64_t end) {
    bool all = true;
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / N, n = i % N, id = ids.data[b * ids.batch + n * ids.column];
      T* const row = out + b * to.batch + n / to.grid_width * to.grid_row + n % to.grid_width * to.grid_column;
      all &= id >= 0 && id < limit;
      if (id >= 0 && id < count) {
        const int64_t place = id / from.grid_width * from.grid_row + id % from.grid_width * from.grid_column;
        copy_patch(source + b * from.batch + place, from, row, to, shape);
      } else if (fill) {
        copy_patch(fill, packed, row, to, shape);
      } else {
        zero_patch(row, to, shape);
      }
    }
    if (!all) __atomic_store_n(&right, false, __ATOMIC_RELAXED);
  });
  return right;
}

// Elements are moved and never computed with, so integers of their size stand for every type.
bool gather(int element_size, const void* source, Patches from, const void* fill, Ids ids, int64_t B, int64_t N,
            int64_t count, int64_t limit, PatchShape shape, void* out, Patches to, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return gather_rows(static_cast<const T*>(source), from, static_cast<const T*>(fill), ids, B, N, count, limit, shape,
                       static_cast<T*>(out), to, threads);
  };
  if (element_size == 2) return run(uint16_t{});
  return element_size == 4 ? run(uint32_t{}) : run(uint64_t{});
}

template <class T>
void add_row(const T* row, int64_t column, float* sum, int64_t D) {
  int64_t d = 0;
  if (column == 1)
    for (; d + kWidth <= D; d += kWidth) store(sum + d, load(sum + d) + load(row + d));
  for (; d < D; d++) sum[d] += widen(row[d * column]);
}

void add_row(const double* row, int64_t column, double* sum, int64_t D) {
  for (int64_t d = 0; d < D; d++) sum[d] += row[d * column];
}

template <class S>
void clear(S* sum, int64_t D) {
  for (int64_t d = 0; d < D; d++) sum[d] = 0;
}

template <class T, class S>
void sum_rows(const T* grad, int64_t batch, int64_t row, int64_t column, Ids ids, int64_t B, int64_t L, int64_t K,
              int64_t D, S* partial, S* sum, int threads) {
  const int64_t groups = B < kGroups ? B : kGroups;
  const int64_t bytes = B * (L - K) * D * static_cast<int64_t>(sizeof(T));
  parallel_for(groups, useful_threads(bytes, kBytesPerThread, threads), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) {
      S *const own = partial + 2 * g * D, *const sample = own + D;
      clear(own, D);
      for (int64_t b = B * g / groups; b < B * (g + 1) / groups; b++) {
        clear(sample, D);
        for (int64_t l = 0; l < L; l++)
          if (ids.data[b * ids.batch + l * ids.column] >= K) add_row(grad + b * batch + l * row, column, sample, D);
        for (int64_t d = 0; d < D; d++) own[d] += sample[d];
      }
    }
  });
  clear(sum, D);
  for (int64_t g = 0; g < groups; g++)
    for (int64_t d = 0; d < D; d++) sum[d] += partial[2 * g * D + d];
}

void masked_sum(DType dtype, const void* grad, int64_t batch, int64_t row, int64_t column, Ids ids, int64_t B,
                int64_t L, int64_t K, int64_t D, void* partial, void* sum, int threads) {
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    using S = Computed<T>;
    sum_rows(static_cast<const T*>(grad), batch, row, column, ids, B, L, K, D, static_cast<S*>(partial),
             static_cast<S*>(sum), threads);
  });
}

}  // namespace

MaskingKernels masking_kernels() {
  return {random_masking, invert, gather, masked_sum};
}

}  // namespace hsv::HSV_ISA
