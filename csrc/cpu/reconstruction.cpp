#include "cpu/reconstruction.h"

#include <math.h>
#include <stdlib.h>

#include "cpu/element_vectors.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace hsv::HSV_ISA {
namespace {

constexpr double kEps = 1e-6;
constexpr int64_t kValuesPerThread = 1 << 15;  // a thread for less costs more to wake than it saves

// Applies f(vector, index) to the whole vectors of [0, n) and g(index) to the rest.
template <class T, class F, class G>
HSV_INLINE void for_vectors(int64_t n, const F& f, const G& g) {
  constexpr int width = kLanes<T>;
  int64_t i = 0;
  for (; i + width <= n; i += width) f(i);
  for (; i < n; i++) g(i);
}

template <class T>
T sum_of(const T* x, int64_t n) {
  Vector<T> total{};
  T rest = 0;
  for_vectors<T>(n, [&](int64_t i) { total += load(x + i); }, [&](int64_t i) { rest += x[i]; });
  return sum(total) + rest;
}

// Σ (x − mean)²
template <class T>
T squares_about(const T* x, T mean, int64_t n) {
  Vector<T> total{};
  T rest = 0;
  for_vectors<T>(
      n,
      [&](int64_t i) {
        const auto d = load(x + i) - mean;
        total += d * d;
      },
      [&](int64_t i) { rest += (x[i] - mean) * (x[i] - mean); });
  return sum(total) + rest;
}

// Σ (pred − (x − mean) · rstd)²
template <class T, class P>
T squared_error(const P* pred, const T* x, T mean, T rstd, int64_t n) {
  Vector<T> total{};
  T rest = 0;
  for_vectors<T>(
      n,
      [&](int64_t i) {
        const auto d = load(pred + i) - (load(x + i) - mean) * rstd;
        total += d * d;
      },
      [&](int64_t i) {
        const T d = widen(pred[i]) - (x[i] - mean) * rstd;
        rest += d * d;
      });
  return sum(total) + rest;
}

// gradient = weight · (pred − (x − mean) · rstd)
template <class T, class P>
void scaled_residual(const P* pred, const T* x, T mean, T rstd, T weight, int64_t n, P* gradient) {
  for_vectors<T>(
      n, [&](int64_t i) { store(gradient + i, (load(pred + i) - (load(x + i) - mean) * rstd) * weight); },
      [&](int64_t i) { narrow((widen(pred[i]) - (x[i] - mean) * rstd) * weight, gradient + i); });
}

template <class T, class I>
HSV_INLINE void widen_row(const I* row, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; i++) out[i] = widen(row[i]);
}
template <class I>
HSV_INLINE void widen_row(const I* row, int64_t n, float* __restrict out) {
  for_vectors<float>(n, [&](int64_t i) { store(out + i, load(row + i)); }, [&](int64_t i) { out[i] = widen(row[i]); });
}
HSV_INLINE void widen_row(const double* row, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; i++) out[i] = static_cast<float>(row[i]);
}

// out[3 i + c] = planes[c n + i], written by whole vectors where the instruction set permutes lanes; returns how many
// i.
#if defined(__AVX2__)
HSV_INLINE Vec permute(Vec v, IVec lanes) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)lanes, (__m512)v);
#else
  return (Vec)_mm256_permutevar8x32_ps((__m256)v, (__m256i)lanes);
#endif
}

int64_t interleave_vectors(const float* planes, int64_t n, float* out) {
  IVec pixel[3], channel[3];
  for (int k = 0; k < 3; k++)
    for (int i = 0; i < kWidth; i++) pixel[k][i] = (k * kWidth + i) / 3, channel[k][i] = (k * kWidth + i) % 3;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec plane[3] = {load(planes + i), load(planes + n + i), load(planes + 2 * n + i)};
    HSV_UNROLL
    for (int k = 0; k < 3; k++) {
      const Vec last = channel[k] == 1 ? permute(plane[1], pixel[k]) : permute(plane[2], pixel[k]);
      store(out + 3 * i + k * kWidth, channel[k] == 0 ? permute(plane[0], pixel[k]) : last);
    }
  }
  return i;
}
#else
int64_t interleave_vectors(const float*, int64_t, float*) {
  return 0;
}
#endif
int64_t interleave_vectors(const double*, int64_t, double*) {
  return 0;
}

// Patch t of the batch, in (p, q, c) order; `planes` is room for another patch.
template <class T, class I>
void load_patch(const I* images, const PatchGrid& g, int64_t t, T* planes, T* out) {
  const int64_t L = g.rows * g.columns, b = t / L, l = t % L, C = g.channels, pixels = g.p * g.q;
  images += b * g.stride_b + l / g.columns * g.p * g.stride_h + l % g.columns * g.q * g.stride_w;
  if (g.stride_w == C && (C == 1 || g.stride_c == 1)) {
    for (int64_t y = 0; y < g.p; y++) widen_row(images + y * g.stride_h, g.q * C, out + y * g.q * C);
  } else if (g.stride_w == 1) {
    for (int64_t c = 0; c < C; c++)
      for (int64_t y = 0; y < g.p; y++)
        widen_row(images + c * g.stride_c + y * g.stride_h, g.q, planes + c * pixels + y * g.q);
    for (int64_t i = C == 3 ? interleave_vectors(planes, pixels, out) : 0; i < pixels; i++)
      for (int64_t c = 0; c < C; c++) out[i * C + c] = planes[c * pixels + i];
  } else {
    for (int64_t i = 0; i < pixels; i++)
      for (int64_t c = 0; c < C; c++)
        out[i * C + c] = widen(images[i / g.q * g.stride_h + c * g.stride_c + i % g.q * g.stride_w]);
  }
}

// The type that predictions of type P are computed in.
template <class P>
struct Computed {
  typedef float type;
};
template <>
struct Computed<double> {
  typedef double type;
};

// Runs f(t, pred, x) for every patch: its row of predictions and, where mask is not 0, its pixels in (p, q, c) order.
template <class T, class P, class I, class F>
void for_patches(const PatchRows& rows, const P* pred, const I* images, const PatchGrid& g, const T* mask, int threads,
                 const F& f) {
  const int64_t L = g.rows * g.columns, n = g.p * g.q * g.channels;
  const int64_t useful = 1 + g.batch * L * n / kValuesPerThread;
  parallel_for(g.batch * L, static_cast<int>(threads < useful ? threads : useful), [&](int64_t begin, int64_t end) {
    T *const x = static_cast<T*>(malloc(2 * n * sizeof(T))), *const planes = x + n;
    for (int64_t t = begin; t < end; t++) {
      if (mask[t] != 0) load_patch(images, g, t, planes, x);
      f(t, pred + t / L * rows.stride_b + t % L * rows.stride_l, x);
    }
    free(x);
  });
}

template <class P, class I>
void forward_typed(const PatchRows& rows, const P* pred, const I* images, const PatchGrid& g, const void* masks,
                   bool norm_pix, void* losses, void* means, void* rstds, int threads) {
  typedef typename Computed<P>::type T;
  const int64_t n = g.p * g.q * g.channels;
  const T* mask = static_cast<const T*>(masks);
  T *loss = static_cast<T*>(losses), *mean = static_cast<T*>(means), *rstd = static_cast<T*>(rstds);
  for_patches(rows, pred, images, g, mask, threads, [=](int64_t t, const P* row, const T* x) {
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
void backward_typed(const PatchRows& rows, const P* pred, const I* images, const PatchGrid& g, const void* masks,
                    const void* weights, const void* means, const void* rstds, void* gradients, int threads) {
  typedef typename Computed<P>::type T;
  const int64_t n = g.p * g.q * g.channels;
  const T *mask = static_cast<const T*>(masks), *weight = static_cast<const T*>(weights);
  const T *mean = static_cast<const T*>(means), *rstd = static_cast<const T*>(rstds);
  P* gradient = static_cast<P*>(gradients);
  prefer_huge_pages(gradient, g.batch * g.rows * g.columns * n * static_cast<int64_t>(sizeof(P)));
  for_patches(rows, pred, images, g, mask, threads, [=](int64_t t, const P* row, const T* x) {
    if (mask[t] == 0)
      memset(gradient + t * n, 0, n * sizeof(P));
    else
      scaled_residual(row, x, mean[t], rstd[t], weight[t], n, gradient + t * n);
  });
}

// Calls f with `data` as a pointer to the type that `code` (a DType) names.
template <class F>
void with_type(int code, const void* data, const F& f) {
  switch (static_cast<DType>(code)) {
    case DType::kFloat32:
      return f(static_cast<const float*>(data));
    case DType::kFloat64:
      return f(static_cast<const double*>(data));
    case DType::kBFloat16:
      return f(static_cast<const BFloat16*>(data));
    case DType::kFloat16:
      return f(static_cast<const Float16*>(data));
  }
}

void forward(const PatchRows& rows, const void* images, int images_type, const PatchGrid& g, const void* mask,
             bool norm_pix, void* losses, void* mean, void* rstd, int threads) {
  with_type(rows.type, rows.data, [&](auto* pred) {
    with_type(images_type, images,
              [&](auto* x) { forward_typed(rows, pred, x, g, mask, norm_pix, losses, mean, rstd, threads); });
  });
}

void backward(const PatchRows& rows, const void* images, int images_type, const PatchGrid& g, const void* mask,
              const void* weights, const void* mean, const void* rstd, void* gradient, int threads) {
  with_type(rows.type, rows.data, [&](auto* pred) {
    with_type(images_type, images,
              [&](auto* x) { backward_typed(rows, pred, x, g, mask, weights, mean, rstd, gradient, threads); });
  });
}

}  // namespace

ReconstructionKernels reconstruction_kernels() {
  return {forward, backward};
}

}  // namespace hsv::HSV_ISA
