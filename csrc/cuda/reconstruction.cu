#include "cuda/launch.h"
#include "cuda/patch_lane.h"
#include "cuda/reconstruction.h"

namespace hsv::cuda {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kWide = 8;  // values of a plane at a time
constexpr float kEps = 1e-6f;

// The same bits in every lane.
__device__ float sum_of_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// One patch per warp; a visible one is not read.
template <class P, class X, int I, int V>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Rows<const P> pred, const X* __restrict__ images, Layout layout, const float* __restrict__ mask,
                   int64_t B, int64_t L, bool norm_pix, float* losses, float* means, float* rstds) {
  const int lane = threadIdx.x % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; t < B * L; t += step) {
    const float weight = mask[t];
    float loss = 0, mean = 0, rstd = 0;
    if (weight != 0) {  // the same in all lanes
      const MaskedPatch<P, X, I, V> patch{pred, images, layout, t / L, static_cast<uint32_t>(t % L)};
      const PatchLane<P, X, I, V> of_lane(patch, lane);
      const float n = static_cast<float>(layout.values);
      rstd = 1;
      if (norm_pix) {
        mean = sum_of_warp(of_lane.pixels()) / n;
        rstd = 1 / sqrtf(sum_of_warp(of_lane.squares(mean)) / (n - 1) + kEps);
      }
      loss = weight * (sum_of_warp(of_lane.errors(mean, rstd)) / n);
    }
    if (lane > 0) continue;
    losses[t] = loss;
    means[t] = mean;
    rstds[t] = rstd;
  }
}

template <class P, class X, int I, int V>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Rows<const P> pred, const X* __restrict__ images, Layout layout, const float* __restrict__ mask,
                    int64_t B, int64_t L, const float* __restrict__ weights, const float* __restrict__ means,
                    const float* __restrict__ rstds, P* __restrict__ gradient) {
  __shared__ alignas(kWidest) unsigned char staging[kThreads * sizeof(Group<P, I, V>)];
  auto* const stage = reinterpret_cast<Group<P, I, V>*>(staging) + threadIdx.x / 32 * 32;
  const int lane = threadIdx.x % 32;
  const uint32_t groups = static_cast<uint32_t>(layout.values) / (I * V);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; t < B * L; t += step) {
    const auto store = [&](uint32_t begin, const Group<P, I, V>& of_lane) {
      stage[lane] = of_lane;
      __syncwarp();
      store_staged<P, I, V>(stage, lane, groups - begin, gradient + t * layout.values + begin * (I * V));
      __syncwarp();
    };
    if (mask[t] == 0) {  // the same in all lanes
      for (uint32_t begin = 0; begin < groups; begin += 32) store(begin, {});
      continue;
    }
    const float weight = weights[t], mean = means[t], rstd = rstds[t];
    const MaskedPatch<P, X, I, V> patch{pred, images, layout, t / L, static_cast<uint32_t>(t % L)};
    for (uint32_t begin = 0; begin < groups; begin += 32) {
      Group<P, I, V> of_lane = {};
      if (begin + lane < groups) of_lane = patch.gradient(begin + lane, weight, mean, rstd);
      store(begin, of_lane);
    }
  }
}

// Calls run(rows of predictions, images, layout, I, V) with their types, and with three planes or one of which the
// widest accesses or one value are taken at a time.
template <class F>
void with_types(const ReconstructionProblem& p, const F& run) {
  const auto with_layout = [&](auto prediction, auto pixel) {
    using P = decltype(prediction);
    using X = decltype(pixel);
    const Rows<const P> pred = {static_cast<const P*>(p.pred), p.pred_batch, p.pred_row, p.pred_value};
    const X* const images = static_cast<const X*>(p.images);
    Layout layout = layout_of(p.at, p.shape, sizeof(X), reinterpret_cast<uintptr_t>(images), kWide);
    layout.wide &= is_wide(pred, kWide);
    const auto planes = [&](auto V) {
      layout.planes == 3 ? run(pred, images, layout, std::integral_constant<int, 3>{}, V)
                         : run(pred, images, layout, std::integral_constant<int, 1>{}, V);
    };
    layout.wide ? planes(std::integral_constant<int, kWide>{}) : planes(std::integral_constant<int, 1>{});
  };
  const bool single = p.images_dtype == DType::kFloat32;
  switch (p.pred_dtype) {
    case DType::kBFloat16:
      return single ? with_layout(BFloat16{}, 0.0f) : with_layout(BFloat16{}, BFloat16{});
    case DType::kFloat16:
      return single ? with_layout(Float16{}, 0.0f) : with_layout(Float16{}, Float16{});
    default:
      return with_layout(0.0f, 0.0f);
  }
}

}  // namespace

void reconstruction_forward(Stream on, const ReconstructionProblem& problem, bool norm_pix, float* losses, float* mean,
                            float* rstd) {
  with_types(problem, [&](auto pred, auto* images, const Layout& layout, auto I, auto V) {
    using P = std::remove_const_t<std::remove_pointer_t<decltype(pred.data)>>;
    using X = std::remove_const_t<std::remove_pointer_t<decltype(images)>>;
    launch(on, "masked_mse", [&](cudaStream_t stream) {
      forward_kernel<P, X, I, V><<<grid(problem.B * problem.L, kWarps), kThreads, 0, stream>>>(
          pred, images, layout, problem.mask, problem.B, problem.L, norm_pix, losses, mean, rstd);
    });
  });
}

void reconstruction_backward(Stream on, const ReconstructionProblem& problem, const float* weights, const float* mean,
                             const float* rstd, void* gradient) {
  with_types(problem, [&](auto pred, auto* images, const Layout& layout, auto I, auto V) {
    using P = std::remove_const_t<std::remove_pointer_t<decltype(pred.data)>>;
    using X = std::remove_const_t<std::remove_pointer_t<decltype(images)>>;
    launch(on, "masked_mse backward", [&](cudaStream_t stream) {
      backward_kernel<P, X, I, V><<<grid(problem.B * problem.L, kWarps), kThreads, 0, stream>>>(
          pred, images, layout, problem.mask, problem.B, problem.L, weights, mean, rstd, static_cast<P*>(gradient));
    });
  });
}

}  // namespace hsv::cuda
