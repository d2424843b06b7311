#include "cpu/memory.h"

#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hsv {
namespace {

constexpr int64_t kLeastBytes = 4 << 20;
constexpr uintptr_t kPage = 4096;

bool wanted() {
  const char* setting = getenv("HSV_HUGE_PAGES");
  return setting == nullptr || strcmp(setting, "0") != 0;
}

}  // namespace

void prefer_huge_pages([[maybe_unused]] void* data, int64_t bytes) {
  static const bool on = wanted();
  if (!on || bytes < kLeastBytes) return;
#if defined(__linux__)
  // Pages of which others have a part are included: tensors that follow each other then share huge pages.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes) + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
}

}  // namespace hsv
