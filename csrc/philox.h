// Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, 2011): a counter-based generator, the same bits on host and device.
#pragma once

#include <stdint.h>

#include "host_device.h"

namespace hsv {

// First output word for a 64-bit key and a counter of four 32-bit words.
HSV_HOST_DEVICE uint32_t philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Key by which patch `patch` of image `image` is ranked.
HSV_HOST_DEVICE uint32_t masking_key(uint64_t seed, uint64_t offset, uint32_t image, uint32_t patch) {
  return philox(seed, patch, image, static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32));
}

}  // namespace hsv
