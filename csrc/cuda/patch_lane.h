// A masked patch, and what one lane of the warp that works on it does; host and device.
#pragma once

#include <stdint.h>

#include "cuda/elements.h"
#include "cuda/patches.h"

namespace hsv::cuda {

// The groups of one patch: its pixels X and their predictions P.
template <class P, class X, int I, int V>
struct MaskedPatch {
  static constexpr int N = I * V;
  using Values = float[N];

  const Rows<const P>& pred;
  const X* images;
  const Layout& layout;
  int64_t sample;
  uint32_t patch;

  HSV_HOST_DEVICE uint32_t groups() const { return static_cast<uint32_t>(layout.values) / N; }

  HSV_HOST_DEVICE void load(uint32_t group, Values& pixels, Values& predictions) const {
    const Spot spot{sample, patch, group};
    const auto planes = load_planes<X, I, V>(images + offset_of<I, V>(layout, spot), layout.at.channel);
    const auto predicted = load_packed<I, V>(pred, spot);
    const auto packed = interleave(planes);
#pragma unroll
    for (int o = 0; o < N; o++) {
      pixels[o] = widen(packed.part[o / V].value[o % V]);
      predictions[o] = widen(predicted.part[o / V].value[o % V]);
    }
  }

  // The gradient of one group's predictions.
  HSV_HOST_DEVICE Group<P, I, V> gradient(uint32_t group, float weight, float mean, float rstd) const {
    Values x, y;
    load(group, x, y);
    Group<P, I, V> packed;
#pragma unroll
    for (int o = 0; o < N; o++) narrow((y[o] - (x[o] - mean) * rstd) * weight, &packed.part[o / V].value[o % V]);
    return packed;
  }
};

// Sums over the groups lane, lane + 32, ... of a patch. The first stays in registers, so that patches of up to 32
// groups are read once; what larger ones have besides comes from the caches the second time.
template <class P, class X, int I, int V>
struct PatchLane {
  using Patch = MaskedPatch<P, X, I, V>;
  using Values = typename Patch::Values;

  const Patch& of;
  uint32_t first;
  Values x, y;

  HSV_HOST_DEVICE PatchLane(const Patch& of, int lane) : of(of), first(lane) {
    if (first < of.groups()) of.load(first, x, y);
  }

  // Sum of f(pixel, prediction) over the lane's groups.
  template <class F>
  HSV_HOST_DEVICE float sum(const F& f) const {
    float total = 0;
    if (first < of.groups()) total = sum_of(x, y, f);
    for (uint32_t group = first + 32; group < of.groups(); group += 32) {
      Values pixels, predictions;
      of.load(group, pixels, predictions);
      total += sum_of(pixels, predictions, f);
    }
    return total;
  }

  template <class F>
  HSV_HOST_DEVICE static float sum_of(const Values& pixels, const Values& predictions, const F& f) {
    float total = 0;
#pragma unroll
    for (int o = 0; o < Patch::N; o++) total += f(pixels[o], predictions[o]);
    return total;
  }

  HSV_HOST_DEVICE float pixels() const {
    return sum([](float pixel, float) { return pixel; });
  }
  HSV_HOST_DEVICE float squares(float mean) const {
    return sum([=](float pixel, float) { return (pixel - mean) * (pixel - mean); });
  }
  HSV_HOST_DEVICE float errors(float mean, float rstd) const {
    return sum([=](float pixel, float prediction) {
      const float error = prediction - (pixel - mean) * rstd;
      return error * error;
    });
  }
};

}  // namespace hsv::cuda
