#include "cpu/reconstruction.h"

#include <math.h>
#include <stdlib.h>

#include "cpu/element_vectors.h"
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

// One row of a patch, [C, q] in memory, to `out` [q, C].
template <class T, class I>
HSV_INLINE void load_row(const I* row, const PatchGrid& g, T* __restrict out) {
  const int64_t C = g.channels, q = g.q;
  if (g.stride_w == 1 && C == 3) {
    const I *r0 = row, *r1 = row + g.stride_c, *r2 = row + 2 * g.stride_c;
    for (int64_t x = 0; x < q; x++) {
      out[3 * x] = widen(r0[x]);
      out[3 * x + 1] = widen(r1[x]);
      out[3 * x + 2] = widen(r2[x]);
    }
  } else if ((g.stride_c == 1 && g.stride_w == C) || (C == 1 && g.stride_w == 1)) {
    for (int64_t i = 0; i < q * C; i++) out[i] = widen(row[i]);
  } else {
    for (int64_t x = 0; x < q; x++)
      for (int64_t c = 0; c < C; c++) out[x * C + c] = widen(row[c * g.stride_c + x * g.stride_w]);
  }
}

// Patch t of the batch, in (p, q, c) order.
template <class T, class I>
void load_patch(const I* images, const PatchGrid& g, int64_t t, T* out) {
  const int64_t L = g.rows * g.columns, b = t / L, l = t % L;
  images += b * g.stride_b + l / g.columns * g.p * g.stride_h + l % g.columns * g.q * g.stride_w;
  for (int64_t y = 0; y < g.p; y++) load_row(images + y * g.stride_h, g, out + y * g.q * g.channels);
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
    T* x = static_cast<T*>(malloc(n * sizeof(T)));
    for (int64_t t = begin; t < end; t++) {
      if (mask[t] != 0) load_patch(images, g, t, x);
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
