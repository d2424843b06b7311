// Random masking and rows in other places on a CUDA device: csrc/cuda/masking.h.
#include "bindings/bindings.h"
#include "cuda/masking.h"

namespace hsv::bindings {

void define_cuda_masking(py::module_& m) {
  m.def(
      "cuda_masking_random_masking",
      [](int device, Address stream, Address seed, Address offset, uint32_t first_index, int64_t B, int64_t L,
         int64_t K, Address ids_keep, Address ids_restore, Address mask) {
        cuda::random_masking({device, stream}, pointer<int64_t>(seed), pointer<int64_t>(offset), first_index, B, L, K,
                             pointer<int64_t>(ids_keep), pointer<int64_t>(ids_restore), pointer<float>(mask));
      },
      Release());
  m.def(
      "cuda_masking_gather",
      [](int device, Address stream, int element_size, Address source, const Strides& from, Address fill, Address ids,
         int64_t batch, int64_t column, int64_t B, int64_t N, int64_t count, const Three& shape, Address out) {
        cuda::gather({device, stream}, element_size, pointer(source), patches(from), pointer(fill),
                     {pointer<int64_t>(ids), batch, column}, B, N, count, {shape[0], shape[1], shape[2]}, pointer(out));
      },
      Release());
  m.def(
      "cuda_masking_scatter",
      [](int device, Address stream, int element_size, Address grad, const Three& strides, Address ids, int64_t batch,
         int64_t column, int64_t B, int64_t N, int64_t L, const Three& shape, Address out, const Strides& to) {
        cuda::scatter({device, stream}, element_size, pointer(grad), strides[0], strides[1], strides[2],
                      {pointer<int64_t>(ids), batch, column}, B, N, L, {shape[0], shape[1], shape[2]}, pointer(out),
                      patches(to));
      },
      Release());
  m.def(
      "cuda_masking_masked_sum",
      [](int device, Address stream, int dtype, Address grad, const Three& strides, Address ids, int64_t batch,
         int64_t column, int64_t B, int64_t L, int64_t K, int64_t D, Address partial) {
        cuda::masked_sum({device, stream}, dtype_of(dtype), pointer(grad), strides[0], strides[1], strides[2],
                         {pointer<int64_t>(ids), batch, column}, B, L, K, D, pointer<float>(partial));
      },
      Release());
}

}  // namespace hsv::bindings
