// Memory that torch has just allocated and a kernel is about to fill.
#pragma once

#include <stdint.h>

namespace hsv {

// Asks for huge pages under a fresh output of several MiB: its page faults can cost more than the kernel that fills it.
// Does nothing for less, where the system has no huge pages, or with HSV_HUGE_PAGES=0.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace hsv
