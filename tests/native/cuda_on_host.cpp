// Every thread of the CUDA kernels' launches, one after the other on the host: the arithmetic that csrc/cuda shares
// with it, in the order of the kernels. Built by tests/kernels/test_cuda_on_host.py.
#include <cmath>
#include <vector>

#include "cuda/patch_lane.h"
#include "cuda/patches.h"
#include "philox.h"
#include "ranking.h"

using namespace hsv;
using namespace hsv::cuda;

namespace {

constexpr int kThreads = 256, kLanes = 32;

template <class T, int I, int V>
void gather_patches(const T* source, const Layout& from, Ids ids, int64_t B, uint32_t N, int64_t count, const T* fill,
                    T* out) {
  const uint32_t groups = from.values / (I * V);
  const int64_t total = B * N * groups;
  for (int64_t first = 0; first < total; first += kThreads * kInFlight<I>) {
    const Spot start = spot_of(first, groups, N);
    for (uint32_t of_warp = 0; of_warp < kThreads * kInFlight<I>; of_warp += kLanes) {
      Group<T, I, V> stage[kLanes];
      for (uint32_t lane = 0; lane < kLanes; lane++)
        if (first + of_warp + lane < total)
          stage[lane] = gathered<T, I, V>(source, from, ids, count, fill, spot_after(start, of_warp + lane, groups, N));
      for (int lane = 0; lane < kLanes; lane++)
        store_staged<T, I, V>(stage, lane, total - first - of_warp, out + (first + of_warp) * (I * V));
    }
  }
}

template <class T, int I, int V>
void scatter_patches(const Rows<const T>& grad, Ids ids, int64_t B, int64_t N, int64_t L, T* out, const Layout& to) {
  const uint32_t groups = to.values / (I * V);
  for (int64_t b = 0; b < B; b++) {
    std::vector<int64_t> sources(L, -1);
    for (int64_t n = 0; n < N; n++) {
      const int64_t id = ids.data[b * ids.batch + n * ids.column];
      if (id < L) sources[id] = n;
    }
    for (uint32_t e = 0; e < L * groups; e++) {
      const uint32_t l = e / groups, group = e % groups;
      Group<T, I, V> packed = {};
      if (sources[l] >= 0) packed = load_packed<I, V>(grad, Spot{b, static_cast<uint32_t>(sources[l]), group});
      store_planes<T, I, V>(out + offset_of<I, V>(to, Spot{b, l, group}), to.at.channel, separate(packed));
    }
  }
}

template <class Lanes, class F>
float sum_of_warp(const Lanes& lanes, const F& part) {
  float total = 0;
  for (const auto& lane : lanes) total += part(lane);
  return total;
}

template <class P, class X, int I, int V>
void forward_patches(const Rows<const P>& pred, const X* images, const Layout& layout, const float* mask, int64_t B,
                     int64_t L, float* losses, float* means, float* rstds) {
  const float n = static_cast<float>(layout.values);
  for (int64_t t = 0; t < B * L; t++) {
    losses[t] = means[t] = rstds[t] = 0;
    if (mask[t] == 0) continue;
    const MaskedPatch<P, X, I, V> patch{pred, images, layout, t / L, static_cast<uint32_t>(t % L)};
    std::vector<PatchLane<P, X, I, V>> lanes;
    for (int lane = 0; lane < kLanes; lane++) lanes.emplace_back(patch, lane);
    const float mean = sum_of_warp(lanes, [](const auto& lane) { return lane.pixels(); }) / n;
    const float squares = sum_of_warp(lanes, [&](const auto& lane) { return lane.squares(mean); });
    const float rstd = 1 / std::sqrt(squares / (n - 1) + 1e-6f);
    means[t] = mean;
    rstds[t] = rstd;
    losses[t] = mask[t] * (sum_of_warp(lanes, [&](const auto& lane) { return lane.errors(mean, rstd); }) / n);
  }
}

template <class P, class X, int I, int V>
void backward_patches(const Rows<const P>& pred, const X* images, const Layout& layout, const float* mask, int64_t B,
                      int64_t L, const float* weights, const float* means, const float* rstds, P* gradient) {
  const uint32_t groups = layout.values / (I * V);
  for (int64_t t = 0; t < B * L; t++) {
    const MaskedPatch<P, X, I, V> patch{pred, images, layout, t / L, static_cast<uint32_t>(t % L)};
    for (uint32_t begin = 0; begin < groups; begin += kLanes) {
      Group<P, I, V> stage[kLanes] = {};
      for (uint32_t lane = 0; lane < kLanes; lane++)
        if (mask[t] != 0 && begin + lane < groups)
          stage[lane] = patch.gradient(begin + lane, weights[t], means[t], rstds[t]);
      for (int lane = 0; lane < kLanes; lane++)
        store_staged<P, I, V>(stage, lane, groups - begin, gradient + t * layout.values + begin * (I * V));
    }
  }
}

template <int V, class F>
int with_groups(const Layout& layout, const F& run) {
  const auto planes = [&](auto values) {
    layout.planes == 3 ? run(std::integral_constant<int, 3>{}, values) : run(std::integral_constant<int, 1>{}, values);
  };
  layout.wide ? planes(std::integral_constant<int, V>{}) : planes(std::integral_constant<int, 1>{});
  return layout.wide ? V : 1;
}

Patches patches(const int64_t* s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
}

template <class T>
int gather_any(const void* source, const int64_t* from, const void* fill, Ids ids, int64_t B, int64_t N, int64_t count,
               const int64_t* shape, void* out) {
  constexpr int kWide = kWidest / sizeof(T);
  const auto address = reinterpret_cast<uintptr_t>(source);
  Layout layout = layout_of(patches(from), {shape[0], shape[1], shape[2]}, sizeof(T), address, kWide);
  layout.wide &= reinterpret_cast<uintptr_t>(fill) % kWidest == 0;
  return with_groups<kWide>(layout, [&](auto I, auto V) {
    gather_patches<T, I, V>(static_cast<const T*>(source), layout, ids, B, N, count, static_cast<const T*>(fill),
                            static_cast<T*>(out));
  });
}

template <class T>
int scatter_any(const void* grad, const int64_t* s, Ids ids, int64_t B, int64_t N, int64_t L, const int64_t* shape,
                void* out, const int64_t* to) {
  constexpr int kWide = kWidest / sizeof(T);
  const Rows<const T> rows = {static_cast<const T*>(grad), s[0], s[1], s[2]};
  const auto address = reinterpret_cast<uintptr_t>(out);
  Layout layout = layout_of(patches(to), {shape[0], shape[1], shape[2]}, sizeof(T), address, kWide);
  layout.wide &= is_wide(rows, kWide);
  return with_groups<kWide>(
      layout, [&](auto I, auto V) { scatter_patches<T, I, V>(rows, ids, B, N, L, static_cast<T*>(out), layout); });
}

}  // namespace

extern "C" {

void masks(uint64_t seed, uint64_t offset, uint32_t first_index, int64_t B, int64_t L, int64_t K, int64_t* ids_keep,
           int64_t* ids_restore, float* mask) {
  std::vector<uint32_t> keys(L);
  for (int64_t b = 0; b < B; b++) {
    for (int64_t l = 0; l < L; l++) keys[l] = masking_key(seed, offset, first_index + b, l);
    const Rank rank = rank_of(K, [&](uint32_t key) {
      int64_t below = 0;
      for (const uint32_t other : keys) below += other < key;
      return below;
    });
    int64_t kept = 0, ties = 0;
    for (int64_t l = 0; l < L; l++) {
      const bool chosen = is_kept(keys[l], ties, rank);
      ties += keys[l] == rank.key;
      if (chosen) ids_keep[b * K + kept] = l;
      ids_restore[b * L + l] = chosen ? kept : K + l - kept;
      mask[b * L + l] = chosen ? 0.0f : 1.0f;
      kept += chosen;
    }
  }
}

// These return how many values of a plane are moved at a time.
int gather(int size, const void* source, const int64_t* from, const void* fill, const int64_t* ids, int64_t batch,
           int64_t column, int64_t B, int64_t N, int64_t count, const int64_t* shape, void* out) {
  return size == 2 ? gather_any<uint16_t>(source, from, fill, {ids, batch, column}, B, N, count, shape, out)
                   : gather_any<uint32_t>(source, from, fill, {ids, batch, column}, B, N, count, shape, out);
}

int scatter(int size, const void* grad, const int64_t* strides, const int64_t* ids, int64_t batch, int64_t column,
            int64_t B, int64_t N, int64_t L, const int64_t* shape, void* out, const int64_t* to) {
  return size == 2 ? scatter_any<uint16_t>(grad, strides, {ids, batch, column}, B, N, L, shape, out, to)
                   : scatter_any<uint32_t>(grad, strides, {ids, batch, column}, B, N, L, shape, out, to);
}

// Forward and backward of one loss; the types are codes of DType.
int masked_mse(int pred_dtype, const void* predictions, const int64_t* s, int images_dtype, const void* images,
               const int64_t* at, const int64_t* shape, const float* mask, const float* weights, int64_t B, int64_t L,
               float* losses, float* mean, float* rstd, void* gradient) {
  const auto run = [&](auto prediction, auto pixel) {
    using P = decltype(prediction);
    using X = decltype(pixel);
    const Rows<const P> pred = {static_cast<const P*>(predictions), s[0], s[1], s[2]};
    const auto address = reinterpret_cast<uintptr_t>(images);
    Layout layout = layout_of(patches(at), {shape[0], shape[1], shape[2]}, sizeof(X), address, 8);
    layout.wide &= is_wide(pred, 8);
    return with_groups<8>(layout, [&](auto I, auto V) {
      const X* const x = static_cast<const X*>(images);
      forward_patches<P, X, I, V>(pred, x, layout, mask, B, L, losses, mean, rstd);
      backward_patches<P, X, I, V>(pred, x, layout, mask, B, L, weights, mean, rstd, static_cast<P*>(gradient));
    });
  };
  const bool single = static_cast<DType>(images_dtype) == DType::kFloat32;
  switch (static_cast<DType>(pred_dtype)) {
    case DType::kBFloat16:
      return single ? run(BFloat16{}, 0.0f) : run(BFloat16{}, BFloat16{});
    case DType::kFloat16:
      return single ? run(Float16{}, 0.0f) : run(Float16{}, Float16{});
    default:
      return run(0.0f, 0.0f);
  }
}
}
