#include "cpu/reconstruction.h"

#include <math.h>

#include "cpu/arena.h"
#include "cpu/element_vectors.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace hsv::HSV_ISA {
namespace {

constexpr double kEps = 1e-6;

constexpr int64_t kCacheLine = 64;
constexpr int kChains = 4;  // sums in flight: one alone waits for each addition to end

// Σ term over [0, n), in an order that n alone decides.
template <class T, class F>
HSV_INLINE T sum_over(int64_t n, const F& term) {
  Vector<T> totals[kChains] = {};
  T rest = 0;
  int64_t i = 0;
  for (; i + kChains * kLanes<T> <= n; i += kChains * kLanes<T>) {
    HSV_UNROLL
    for (int c = 0; c < kChains; c++) totals[c] += term(VectorAt{i + c * kLanes<T>});
  }
  for (; i + kLanes<T> <= n; i += kLanes<T>) totals[0] += term(VectorAt{i});
  for (; i < n; i++) rest += term(ElementAt{i});
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3])) + rest;
}

template <class T>
T sum_of(const T* x, int64_t n) {
  return sum_over<T>(n, [=](auto at) { return at(x); });
}

// Σ (x − mean)²
template <class T>
T squares_about(const T* x, T mean, int64_t n) {
  return sum_over<T>(n, [=](auto at) {
    const auto d = at(x) - mean;
    return d * d;
  });
}

// Σ (pred − (x − mean) · rstd)²
template <class T, class P>
T squared_error(const P* pred, const T* x, T mean, T rstd, int64_t n) {
  return sum_over<T>(n, [=](auto at) {
    const auto d = at(pred) - (at(x) - mean) * rstd;
    return d * d;
  });
}

// gradient = weight · (pred − (x − mean) · rstd)
template <class T, class P>
void scaled_residual(const P* pred, const T* x, T mean, T rstd, T weight, int64_t n, P* gradient) {
  const auto value = [=](auto at) { return (at(pred) - (at(x) - mean) * rstd) * weight; };
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(gradient + i, value(VectorAt{i}));
  for (; i < n; i++) narrow(value(ElementAt{i}), gradient + i);
}

template <class T, class I>
HSV_INLINE void widen_row(const I* row, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; i++) out[i] = widen(row[i]);
}
template <class I>
HSV_INLINE void widen_row(const I* row, int64_t n, float* __restrict out) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, load(row + i));
  for (; i < n; i++) out[i] = widen(row[i]);
}
HSV_INLINE void widen_row(const double* row, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; i++) out[i] = static_cast<float>(row[i]);
}

#if defined(__AVX2__)
// Lanes of a (numbers below kWidth) and b (kWidth and above).
HSV_INLINE Vec pick(Vec a, Vec b, IVec lanes) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permutex2var_ps((__m512)a, (__m512i)lanes, (__m512)b);
#else
  const __m256 of_a = _mm256_permutevar8x32_ps((__m256)a, (__m256i)lanes);
  const __m256 of_b = _mm256_permutevar8x32_ps((__m256)b, (__m256i)lanes);
  return (Vec)_mm256_blendv_ps(of_a, of_b, (__m256)(lanes << 28));
#endif
}

// Which lanes of three planes make three vectors of pixels: first of planes 0 and 1, then of these and plane 2.
struct Interleaving {
  alignas(kVectorBytes) int32_t first[3 * kWidth];
  alignas(kVectorBytes) int32_t second[3 * kWidth];
};
constexpr Interleaving interleaving() {
  Interleaving lanes{};
  for (int i = 0; i < 3 * kWidth; i++) {
    lanes.first[i] = i % 3 == 1 ? kWidth + i / 3 : i / 3;
    lanes.second[i] = i % 3 == 2 ? kWidth + i / 3 : i % kWidth;
  }
  return lanes;
}
constexpr Interleaving kInterleaving = interleaving();

HSV_INLINE IVec load_lanes(const int32_t* lanes) {
  IVec v;
  memcpy(&v, lanes, sizeof v);
  return v;
}

// out[3 i + c] = plane c's value i, for whole vectors of i; returns how many i.
template <class I>
HSV_INLINE int64_t interleave_vectors(const I* planes, int64_t stride, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec plane0 = load(planes + i), plane1 = load(planes + stride + i), plane2 = load(planes + 2 * stride + i);
    HSV_UNROLL
    for (int k = 0; k < 3 * kWidth; k += kWidth) {
      const Vec two = pick(plane0, plane1, load_lanes(kInterleaving.first + k));
      store(out + 3 * i + k, pick(two, plane2, load_lanes(kInterleaving.second + k)));
    }
  }
  return i;
}
template <class T, class I>
constexpr bool kInterleaves = false;
template <class I>
constexpr bool kInterleaves<float, I> = true;
template <>
constexpr bool kInterleaves<float, double> = false;
#else
template <class T, class I>
constexpr bool kInterleaves = false;
#endif

// Where one patch is read: its row of predictions and its first pixel.
template <class P, class I>
struct Source {
  const P* pred;
  const I* pixels;
};

// Brings [data, data + bytes) into the second cache level, which waits for more lines at once than the first.
HSV_INLINE void prefetch(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
}

// Asks for row y of a patch before it is needed: the rows are short and far apart, which the hardware does not foresee.
template <class P, class I>
HSV_INLINE void prefetch_row(const Source<P, I>& patch, const PatchGrid& g, int64_t y) {
  const int64_t values = g.q * g.channels;
  prefetch(patch.pred + y * values, values * static_cast<int64_t>(sizeof(P)));
  if (g.stride_w > g.channels) return;  // pixels with gaps
  const I* row = patch.pixels + y * g.stride_h;
  for (int64_t c = 0; c < (g.stride_c == 1 ? 1 : g.channels); c++)
    prefetch(row + c * g.stride_c, g.q * g.stride_w * static_cast<int64_t>(sizeof(I)));
}

// The pixels of `patch` in (p, q, c) order, while `next` is on its way; `planes` is room for another patch.
template <class T, class P, class I>
void load_patch(const Source<P, I>& patch, const Source<P, I>& next, const PatchGrid& g, T* planes, T* out) {
  const int64_t C = g.channels, pixels = g.p * g.q;
  const bool in_order = g.stride_w == C && (C == 1 || g.stride_c == 1);
  const bool in_vectors = kInterleaves<T, I> && C == 3 && g.stride_w == 1 && g.q % kWidth == 0;
  const bool in_planes = g.stride_w == 1 && !in_order && !in_vectors;

  for (int64_t y = 0; y < g.p; y++) {
    const I* row = patch.pixels + y * g.stride_h;
    T* const values = out + y * g.q * C;
    prefetch_row(next, g, y);
    if (in_order) {
      widen_row(row, g.q * C, values);
    } else if (in_vectors) {
      if constexpr (kInterleaves<T, I>) interleave_vectors(row, g.stride_c, g.q, values);
    } else if (in_planes) {
      for (int64_t c = 0; c < C; c++) widen_row(row + c * g.stride_c, g.q, planes + c * pixels + y * g.q);
    } else {
      for (int64_t i = 0; i < g.q; i++)
        for (int64_t c = 0; c < C; c++) values[i * C + c] = widen(row[i * g.stride_w + c * g.stride_c]);
    }
  }
  if (!in_planes) return;
  int64_t i = 0;
  if constexpr (kInterleaves<T, T>) i = C == 3 ? interleave_vectors(planes, pixels, pixels, out) : 0;
  for (; i < pixels; i++)
    for (int64_t c = 0; c < C; c++) out[i * C + c] = planes[c * pixels + i];
}

// Runs f(t, pred, x) for every patch: its row of predictions and, where mask is not 0, its pixels in (p, q, c) order.
template <class T, class P, class I, class F>
void for_patches(const PatchRows& rows, const void* images, const PatchGrid& g, const T* mask, int threads,
                 const F& f) {
  const int64_t L = g.rows * g.columns, n = g.p * g.q * g.channels;
  const int useful = useful_threads(g.batch * L * n, kValuesPerThread, threads);
  const int most = static_cast<int>(g.batch * L < useful ? g.batch * L : useful);
  const int64_t padded = whole_lines<T>(n);
  const Array<T> room(2 * padded * most);
  const auto source = [=](int64_t t) {
    const int64_t b = t / L, l = t % L, row = l / g.columns * g.p, column = l % g.columns * g.q;
    return Source<P, I>{static_cast<const P*>(rows.data) + b * rows.stride_b + l * rows.stride_l,
                        static_cast<const I*>(images) + b * g.stride_b + row * g.stride_h + column * g.stride_w};
  };
  parallel(most, [&](int thread, int team) {
    T *const x = room.data + 2 * padded * thread, *const planes = x + padded;
    own_part(g.batch * L, thread, team, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const Source<P, I> patch = source(t);
        if (mask[t] != 0) {
          int64_t next = t + 1;
          while (next < end && mask[next] == 0) next++;
          load_patch(patch, next < end ? source(next) : patch, g, planes, x);
        }
        f(t, patch.pred, x);
      }
    });
  });
}

template <class P, class I>
void forward_typed(const PatchRows& rows, const void* images, const PatchGrid& g, const void* masks, bool norm_pix,
                   void* losses, void* means, void* rstds, int threads) {
  using T = Computed<P>;
  const int64_t n = g.p * g.q * g.channels;
  const T* mask = static_cast<const T*>(masks);
  T *loss = static_cast<T*>(losses), *mean = static_cast<T*>(means), *rstd = static_cast<T*>(rstds);
  for_patches<T, P, I>(rows, images, g, mask, threads, [=](int64_t t, const P* row, const T* x) {
    loss[t] = mean[t] = rstd[t] = 0;
    if (mask[t] == 0) return;
    rstd[t] = 1;
    if (norm_pix) {
      mean[t] = sum_of(x, n) / n;
      rstd[t] = static_cast<T>(1 / sqrt(squares_about(x, mean[t], n) / (n - 1) + kEps));
    }
    loss[t] = mask[t] * (squared_error(row, x, mean[t], rstd[t], n) / n);
  });
}

template <class P, class I>
void backward_typed(const PatchRows& rows, const void* images, const PatchGrid& g, const void* masks,
                    const void* weights, const void* means, const void* rstds, void* gradients, int threads) {
  using T = Computed<P>;
  const int64_t n = g.p * g.q * g.channels;
  const T *mask = static_cast<const T*>(masks), *weight = static_cast<const T*>(weights);
  const T *mean = static_cast<const T*>(means), *rstd = static_cast<const T*>(rstds);
  P* gradient = static_cast<P*>(gradients);
  prefer_huge_pages(gradient, g.batch * g.rows * g.columns * n * static_cast<int64_t>(sizeof(P)));
  for_patches<T, P, I>(rows, images, g, mask, threads, [=](int64_t t, const P* row, const T* x) {
    if (mask[t] == 0)
      memset(gradient + t * n, 0, n * sizeof(P));
    else
      scaled_residual(row, x, mean[t], rstd[t], weight[t], n, gradient + t * n);
  });
}

void forward(const PatchRows& rows, const void* images, DType images_dtype, const PatchGrid& g, const void* mask,
             bool norm_pix, void* losses, void* mean, void* rstd, int threads) {
  with_type(rows.dtype, [&](auto p) {
    with_type(images_dtype, [&](auto i) {
      forward_typed<decltype(p), decltype(i)>(rows, images, g, mask, norm_pix, losses, mean, rstd, threads);
    });
  });
}

void backward(const PatchRows& rows, const void* images, DType images_dtype, const PatchGrid& g, const void* mask,
              const void* weights, const void* mean, const void* rstd, void* gradient, int threads) {
  with_type(rows.dtype, [&](auto p) {
    with_type(images_dtype, [&](auto i) {
      backward_typed<decltype(p), decltype(i)>(rows, images, g, mask, weights, mean, rstd, gradient, threads);
    });
  });
}

}  // namespace

ReconstructionKernels reconstruction_kernels() {
  return {forward, backward};
}

}  // namespace hsv::HSV_ISA
