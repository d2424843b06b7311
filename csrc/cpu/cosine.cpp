#include "cpu/cosine.h"

#include <math.h>

#include "cpu/element_vectors.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace hsv::HSV_ISA {
namespace {

constexpr int kChains = 2;  // of each sum in flight: one alone waits for each addition to end

// The sums that a cosine is made of.
template <class V>
struct Products {
  V pz, pp, zz;

  HSV_INLINE void add(V p, V z) {
    pz += p * z;
    pp += p * p;
    zz += z * z;
  }
};

// Sums over [0, n), in an order that n alone decides.
template <class T, class E>
HSV_INLINE Products<T> products_of(const E* p, const E* z, int64_t n) {
  Products<Vector<T>> chains[kChains] = {};
  int64_t k = 0;
  for (; k + kChains * kLanes<T> <= n; k += kChains * kLanes<T>) {
    HSV_UNROLL
    for (int c = 0; c < kChains; c++) chains[c].add(load(p + k + c * kLanes<T>), load(z + k + c * kLanes<T>));
  }
  for (; k + kLanes<T> <= n; k += kLanes<T>) chains[0].add(load(p + k), load(z + k));
  Products<T> rest = {};
  for (; k < n; k++) rest.add(widen(p[k]), widen(z[k]));
  return {sum(chains[0].pz + chains[1].pz) + rest.pz, sum(chains[0].pp + chains[1].pp) + rest.pp,
          sum(chains[0].zz + chains[1].zz) + rest.zz};
}

// 1 / max(‖row‖, eps), NaN for NaN.
template <class T>
T inverse_norm(T squares, T eps) {
  const T norm = static_cast<T>(::sqrt(static_cast<double>(squares)));
  return 1 / (norm < eps ? eps : norm);
}

// f(i) for every row, in contiguous parts of the rows.
template <class F>
void for_rows(const CosineProblem& c, const F& f) {
  parallel_for(c.rows, useful_threads(c.rows * c.dim, kValuesPerThread, c.threads), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}

template <class E>
const E* row(const CosineRows& x, int64_t i) {
  return static_cast<const E*>(x.data) + i * x.stride;
}

template <class E>
void forward_typed(const CosineProblem& c, void* losses, void* inv_norm) {
  using T = Computed<E>;
  T *const loss = static_cast<T*>(losses), *const of_p = static_cast<T*>(inv_norm), *const of_z = of_p + c.rows;
  for_rows(c, [=, &c](int64_t i) {
    const Products<T> sums = products_of<T>(row<E>(c.p, i), row<E>(c.z, i), c.dim);
    of_p[i] = inverse_norm(sums.pp, static_cast<T>(c.eps));
    of_z[i] = inverse_norm(sums.zz, static_cast<T>(c.eps));
    loss[i] = -sums.pz * of_p[i] * of_z[i];
  });
}

// out = pull · (across · y + along · x), where both terms are of length 1 at most, whatever the rows' own
template <class T, class E>
HSV_INLINE void combine(const E* x, const E* y, T pull, T across, T along, int64_t n, E* out) {
  const auto value = [=](auto at) HSV_INLINE_LAMBDA { return pull * (across * at(y) + along * at(x)); };
  int64_t k = 0;
  for (; k + kLanes<T> <= n; k += kLanes<T>) store(out + k, value(VectorAt{k}));
  for (; k < n; k++) narrow(value(ElementAt{k}), out + k);
}

template <class E>
void backward_typed(const CosineProblem& c, const void* grads, const void* losses, const void* inv_norm, void* p_grad,
                    void* z_grad) {
  using T = Computed<E>;
  const T *const grad = static_cast<const T*>(grads), *const loss = static_cast<const T*>(losses);
  const T *const of_p = static_cast<const T*>(inv_norm), *const of_z = of_p + c.rows;
  const T most = 1 / static_cast<T>(c.eps);  // of a norm below eps, a constant
  const int64_t bytes = c.rows * c.dim * static_cast<int64_t>(sizeof(E));
  if (p_grad) prefer_huge_pages(p_grad, bytes);
  if (z_grad) prefer_huge_pages(z_grad, bytes);
  for_rows(c, [=, &c](int64_t i) {
    const E *const p = row<E>(c.p, i), *const z = row<E>(c.z, i);
    const auto gradient = [=](const E* x, const E* y, T of_x, T of_y, void* out) {
      const T along = of_x < most ? loss[i] * of_x : 0;
      if (out) combine(x, y, -grad[i] * of_x, of_y, along, c.dim, static_cast<E*>(out) + i * c.dim);
    };
    gradient(p, z, of_p[i], of_z[i], p_grad);
    gradient(z, p, of_z[i], of_p[i], z_grad);
  });
}

void forward(const CosineProblem& c, void* losses, void* inv_norm) {
  with_type(c.dtype, [&](auto element) { forward_typed<decltype(element)>(c, losses, inv_norm); });
}

void backward(const CosineProblem& c, const void* grad, const void* losses, const void* inv_norm, void* p_grad,
              void* z_grad) {
  with_type(c.dtype,
            [&](auto element) { backward_typed<decltype(element)>(c, grad, losses, inv_norm, p_grad, z_grad); });
}

}  // namespace

CosineKernels cosine_kernels() {
  return {forward, backward};
}

}  // namespace hsv::HSV_ISA
