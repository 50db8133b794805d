// How many blocks share a tile of a product whose weight is read once.
#pragma once

#include <cstdint>

#include "quant_formats.h"

namespace llmos {

// Time for `splits` parts of every tile, in units of a stage, where `slots` blocks run at a time: a
// block first waits for its pipeline to fill, and its last part reads the sums of `rows` of all.
// The two constants are guesses until they are measured.
inline int64_t cost_of_splits(int64_t tiles, int64_t stages, int64_t slots, int64_t rows,
                              int64_t splits) {
  constexpr int64_t kFill = 2, kRowsPerStage = 64;
  const int64_t waves = (tiles * splits + slots - 1) / slots;
  const int64_t sums = splits > 1 ? splits * rows : 0;
  return waves * ((stages + splits - 1) / splits + kFill) + sums / kRowsPerStage;
}

// The cheapest number of parts; every part has a stage at least.
inline uint32_t choose_splits(int64_t tiles, int64_t stages, int64_t slots, int64_t rows) {
  int64_t best = 1;
  for (int64_t splits = 2; splits <= stages && splits <= 2 * slots; ++splits)
    if (cost_of_splits(tiles, stages, slots, rows, splits) <
        cost_of_splits(tiles, stages, slots, rows, best))
      best = splits;
  return static_cast<uint32_t>(best);
}

}  // namespace llmos
