// The keys that one tile of query rows meets in one range of keys, in chunks.
#pragma once

#include <stdint.h>
#include <string.h>

#include "tier.hpp"

namespace sparseloom::SL_TIER {

struct KeyStream {
  const int32_t *entry, *end;  // kept key blocks, ascending
  int64_t block;               // keys per block
  int64_t next, stop;          // what is left of the current block
  int64_t limit;               // the first key that no row of the tile sees
  const uint8_t* padding;      // of this batch entry, or null

  // Writes up to `room` keys and returns their number; 0: there are no more.
  int fill(int32_t* keys, int room) {
    if (block == 1 && !padding && next == stop) {
      const int n = end - entry < room ? static_cast<int>(end - entry) : room;
      if (n == 0) return 0;
      memcpy(keys, entry, static_cast<size_t>(n) * sizeof(int32_t));
      entry += n;
      return below_limit(keys, n);
    }
    int n = 0;
    for (;;) {
      for (; next < stop && n < room; ++next)
        if (!padding || padding[next]) keys[n++] = static_cast<int32_t>(next);
      if (n == room || entry == end) return n;
      next = *entry++ * block;
      stop = next + block < limit ? next + block : limit;
      if (next >= limit) entry = end, stop = next;
    }
  }

 private:
  int below_limit(const int32_t* keys, int n) {
    if (keys[n - 1] < limit) return n;
    entry = end;
    while (n > 0 && keys[n - 1] >= limit) --n;
    return n;
  }
};

}  // namespace sparseloom::SL_TIER
