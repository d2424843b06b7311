// Random masking and rows in other places: csrc/cpu/masking.h.
#include "bindings/bindings.h"
#include "cpu/dispatch.h"

namespace hsv::bindings {

void define_masking(py::module_& m) {
  m.def(
      "masking_random_masking",
      [](uint64_t seed, uint64_t offset, uint32_t first_index, int64_t B, int64_t L, int64_t K, Address ids_keep,
         Address ids_restore, Address mask, Address keys, int threads) {
        active_kernels().masking.random_masking(seed, offset, first_index, B, L, K, pointer<int64_t>(ids_keep),
                                                pointer<int64_t>(ids_restore), pointer<float>(mask),
                                                pointer<uint32_t>(keys), threads);
      },
      Release());
  m.def(
      "masking_invert",
      [](Address ids, int64_t batch, int64_t column, int64_t B, int64_t N, int64_t M, int64_t limit, Address table,
         int threads) {
        return active_kernels().masking.invert({pointer<int64_t>(ids), batch, column}, B, N, M, limit,
                                               pointer<int64_t>(table), threads);
      },
      Release());
  m.def(
      "masking_gather",
      [](int element_size, Address source, const Strides& from, Address fill, Address ids, int64_t batch,
         int64_t column, int64_t B, int64_t N, int64_t count, int64_t limit, const Three& shape, Address out,
         const Strides& to, int threads) {
        return active_kernels().masking.gather(element_size, pointer(source), patches(from), pointer(fill),
                                               {pointer<int64_t>(ids), batch, column}, B, N, count, limit,
                                               {shape[0], shape[1], shape[2]}, pointer(out), patches(to), threads);
      },
      Release());
  m.def(
      "masking_masked_sum",
      [](int dtype, Address grad, const Three& strides, Address ids, int64_t batch, int64_t column, int64_t B,
         int64_t L, int64_t K, int64_t D, Address partial, Address sum, int threads) {
        active_kernels().masking.masked_sum(dtype_of(dtype), pointer(grad), strides[0], strides[1], strides[2],
                                            {pointer<int64_t>(ids), batch, column}, B, L, K, D, pointer(partial),
                                            pointer(sum), threads);
      },
      Release());
}

}  // namespace hsv::bindings
