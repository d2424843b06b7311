// Which patches are kept: the K smallest pairs (key, position), found without sorting; the same on host and device.
#pragma once

#include <stdint.h>

#include "host_device.h"

namespace hsv {

struct Rank {
  uint32_t key;  // the K-th smallest
  int64_t ties;  // how many of exactly this key are kept, the first ones
};

// The K-th smallest key, 1 <= K <= number of keys, bit by bit from the highest. count_below(x) is the number of keys
// below x; on a device all threads that share the keys call this together.
template <class CountBelow>
HSV_HOST_DEVICE Rank rank_of(int64_t K, const CountBelow& count_below) {
  Rank rank{0, K};
  for (uint32_t bit = 1u << 31; bit > 0; bit >>= 1) {
    const int64_t below = count_below(rank.key | bit);
    if (below < K) rank = {rank.key | bit, K - below};
  }
  return rank;
}

// Whether a key is kept, `ties` of those before it being of exactly the K-th smallest.
HSV_HOST_DEVICE bool is_kept(uint32_t key, int64_t ties, const Rank& rank) {
  return key < rank.key || (key == rank.key && ties < rank.ties);
}

}  // namespace hsv
