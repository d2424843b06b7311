#include "cpu/memory.h"

#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace hsv {
namespace {

constexpr int64_t kLeastBytes = 4 << 20;

bool wanted() {
  const char* setting = getenv("HSV_HUGE_PAGES");
  return setting == nullptr || strcmp(setting, "0") != 0;
}

}  // namespace

void prefer_huge_pages([[maybe_unused]] void* data, int64_t bytes) {
  static const bool on = wanted();
  if (!on || bytes < kLeastBytes) return;
#if defined(__linux__)
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
}

}  // namespace hsv
