// The quantized matmul, written once over an instruction set S. Include it inside a target region.
//
// Work is cut into tasks of S::kPanels * 16 weight rows by kBlock rows of x. A task first packs its
// weight rows into panels of 16: word i of a panel is 64 bytes, four bytes of each of the 16 rows,
// so that one vector register holds the same k of 16 rows. That costs 4 % of the time at m = 512
// and hides behind memory at m = 1, and no second copy of the weight has to be kept.
// Then S::kRows rows of x at a time run over the packed tile, which sits in the L2 cache.
//
// S gives: I, F (vectors of kLanes int32 / float), kRows, kVectors (tile: kRows x kVectors vectors)
// and the small functions used below.
#pragma once

namespace llmos {
namespace {

// Accumulators stay in registers only where every loop over them is unrolled.
#define LLMOS_UNROLL _Pragma("GCC unroll 8")

constexpr int kPanel = 16;
constexpr int64_t kBlock = 258;  // a multiple of 6; m = 512 takes two

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What kernels need to know of one call, all lengths in words of four packed bytes.
struct Plan {
  int64_t words;            // of a weight row, the last one padded with zeros
  int64_t words_per_group;  // the last group may have fewer
  int64_t groups;
  int64_t stride;  // elements between two prepared rows of x
};

// A packed tile. scales and zeros: [groups][columns]; zeros in the units of the unsigned code.
template <class S>
struct PackedTile {
  static constexpr int kColumns = S::kVectors * S::kLanes;
  static constexpr int kPanels = kColumns / kPanel;
  uint8_t* panels;
  float* scales;
  int32_t* zeros;
};

// Rows of x as the kernels read them, padded with zeros to whole words of weights.
// integer: int8, and for 4-bit weights k = 0..7 stored as 0 2 4 6 1 3 5 7, because the low nibbles
// of a word hold even k. sums: of the int8 values of a group, [m][groups]; scales: [m].
struct Rows {
  const int8_t* integers;
  const float* floats;
  const int32_t* sums;
  const float* scales;
};

template <typename T>
void quantize_row(const T* x, int64_t k, bool interleave, const Plan& plan, int64_t group_size,
                  int8_t* out, int32_t* sums, float* scale) {
  float* buffer = static_cast<float*>(thread_scratch(Scratch::kTile, sizeof(float) * k));
  uint32_t largest = 0;  // as bits of |x|: integer order is float order, with inf and NaN on top
  for (int64_t i = 0; i < k; ++i) {
    buffer[i] = load(&x[i]);
    const uint32_t magnitude = bits_of(buffer[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  std::memset(out, 0, plan.stride);
  if (largest >= 0x7f800000) {
    *scale = float_of(0x7fc00000);
    std::memset(sums, 0, sizeof(int32_t) * plan.groups);
    return;
  }
  const float amax = float_of(largest) < 1e-30f ? 1e-30f : float_of(largest);
  const float inverse = 127.0f / amax;
  *scale = amax / 127.0f;
  for (int64_t i = 0; i < k; ++i)
    out[i] = static_cast<int8_t>(__builtin_rintf(buffer[i] * inverse));
  for (int64_t g = 0; g < plan.groups; ++g) {
    const int64_t end = (g + 1) * group_size < k ? (g + 1) * group_size : k;
    int32_t sum = 0;
    for (int64_t i = g * group_size; i < end; ++i) sum += out[i];
    sums[g] = sum;
  }
  if (interleave)
    for (int64_t i = 0; i < plan.words * 8; i += 8) {
      const int8_t v[8] = {out[i],     out[i + 2], out[i + 4], out[i + 6],
                           out[i + 1], out[i + 3], out[i + 5], out[i + 7]};
      std::memcpy(out + i, v, 8);
    }
}

template <typename T>
void widen_row(const T* x, int64_t k, const Plan& plan, float* out) {
  for (int64_t i = 0; i < k; ++i) out[i] = load(&x[i]);
  std::memset(out + k, 0, sizeof(float) * (plan.stride - k));
}

template <class S>
void pack_tile(const QuantMatmul& c, const Plan& plan, int64_t first, const PackedTile<S>& tile) {
  using Tile = PackedTile<S>;
  const int64_t bytes = row_bytes(c.weight);
  // int8 becomes unsigned by adding 128, which flips the top bit
  const uint32_t flip = c.weight.format == WeightFormat::kInt8 ? 0x80808080u : 0;
  for (int p = 0; p < Tile::kPanels; ++p) {
    const int64_t row = first + p * kPanel;
    if (row >= c.weight.n) break;
    const int valid = static_cast<int>(c.weight.n - row < kPanel ? c.weight.n - row : kPanel);
    S::pack_panel(c.packed + row * bytes, bytes, valid, plan.words, flip,
                  tile.panels + p * plan.words * 64);
  }
  const int32_t zero = c.weight.format == WeightFormat::kInt8   ? 128
                       : c.weight.format == WeightFormat::kInt4 ? 8
                                                                : 0;
  for (int j = 0; j < Tile::kColumns; ++j) {
    const bool inside = first + j < c.weight.n;
    const int64_t source = (first + j) * plan.groups;
    for (int64_t g = 0; g < plan.groups; ++g) {
      const int64_t target = g * Tile::kColumns + j;
      tile.scales[target] = inside ? c.scales[source + g] : 0.0f;
      tile.zeros[target] = inside && c.zeros != nullptr ? c.zeros[source + g] : zero;
    }
  }
}

// y[MR][kColumns], columns of V vectors from `panel` on: int8 activations.
template <class S, int MR, int V, bool k4Bit>
void integer_tile(const PackedTile<S>& tile, int panel, const Plan& plan, const Rows& rows,
                  int64_t row, float* y) {
  using I = typename S::I;
  using F = typename S::F;
  constexpr int kColumns = PackedTile<S>::kColumns;
  const uint8_t* panels = tile.panels + panel * plan.words * 64;
  const int8_t* x = rows.integers + row * plan.stride;
  F sum[MR][V];
  LLMOS_UNROLL for (int m = 0; m < MR; ++m) LLMOS_UNROLL for (int v = 0; v < V; ++v) sum[m][v] =
      S::zero();
  for (int64_t g = 0; g < plan.groups; ++g) {
    const int64_t begin = g * plan.words_per_group;
    const int64_t end = S::min(begin + plan.words_per_group, plan.words);
    const int64_t column = g * kColumns + panel * kPanel;
    I acc[MR][V];  // starts at -zero * sum(x): the panels hold level + zero
    LLMOS_UNROLL for (int m = 0; m < MR; ++m) LLMOS_UNROLL for (int v = 0; v < V; ++v) acc[m][v] =
        S::multiply(S::load_ints(tile.zeros + column + v * S::kLanes),
                    -rows.sums[(row + m) * plan.groups + g]);
    for (int64_t word = begin; word < end; ++word) {
      const uint8_t* w = panels + word * 64;
      I weights[V];
      LLMOS_UNROLL for (int half = 0; half < (k4Bit ? 2 : 1); ++half) {
        LLMOS_UNROLL for (int v = 0; v < V; ++v) {
          const int byte = v * S::kLanes * 4;  // of a word over all panels of the tile
          const I raw = S::load_bytes(w + byte / 64 * plan.words * 64 + byte % 64);
          weights[v] = !k4Bit ? raw : half == 0 ? S::low_nibbles(raw) : S::high_nibbles(raw);
        }
        LLMOS_UNROLL for (int m = 0; m < MR; ++m) {
          const int64_t offset = (k4Bit ? 2 * word + half : word) * 4;
          const I xs = S::broadcast_word(x + m * plan.stride + offset);
          LLMOS_UNROLL for (int v = 0; v < V; ++v) acc[m][v] =
              S::template dot<k4Bit>(acc[m][v], weights[v], xs);
        }
      }
    }
    LLMOS_UNROLL for (int v = 0; v < V; ++v) {
      const F scale = S::load_floats(tile.scales + column + v * S::kLanes);
      LLMOS_UNROLL for (int m = 0; m < MR; ++m) sum[m][v] =
          S::fma(S::to_float(acc[m][v]), scale, sum[m][v]);
    }
  }
  LLMOS_UNROLL for (int m = 0; m < MR; ++m) LLMOS_UNROLL for (int v = 0; v < V; ++v)
      S::store_floats(y + m * kColumns + panel * kPanel + v * S::kLanes,
                      S::multiply(sum[m][v], S::broadcast(rows.scales[row + m])));
}

// As integer_tile, with activations in fp32: weights are decoded in registers.
template <class S, int MR, int V, WeightFormat kFormat>
void float_tile(const PackedTile<S>& tile, int panel, const Plan& plan, const Rows& rows,
                int64_t row, float* y) {
  using I = typename S::I;
  using F = typename S::F;
  constexpr int kColumns = PackedTile<S>::kColumns;
  constexpr int kPerWord = is_4bit(kFormat) ? 8 : 4;
  const uint8_t* panels = tile.panels + panel * plan.words * 64;
  const float* x = rows.floats + row * plan.stride;
  const auto levels = S::template levels<kFormat>();
  F sum[MR][V];
  LLMOS_UNROLL for (int m = 0; m < MR; ++m) LLMOS_UNROLL for (int v = 0; v < V; ++v) sum[m][v] =
      S::zero();
  for (int64_t g = 0; g < plan.groups; ++g) {
    const int64_t begin = g * plan.words_per_group;
    const int64_t end = S::min(begin + plan.words_per_group, plan.words);
    const int64_t column = g * kColumns + panel * kPanel;
    F acc[MR][V];
    LLMOS_UNROLL for (int m = 0; m < MR; ++m) LLMOS_UNROLL for (int v = 0; v < V; ++v) acc[m][v] =
        S::zero();
    for (int64_t word = begin; word < end; ++word) {
      const uint8_t* w = panels + word * 64;
      LLMOS_UNROLL for (int i = 0; i < kPerWord; ++i) {
        F weights[V];
        LLMOS_UNROLL for (int v = 0; v < V; ++v) {
          const int byte = v * S::kLanes * 4;
          const I raw = S::load_bytes(w + byte / 64 * plan.words * 64 + byte % 64);
          weights[v] = S::template decode<kFormat>(raw, i, levels);
          if constexpr (kFormat == WeightFormat::kInt4Asym)
            weights[v] = S::subtract(
                weights[v], S::to_float(S::load_ints(tile.zeros + column + v * S::kLanes)));
        }
        LLMOS_UNROLL for (int m = 0; m < MR; ++m) {
          const F xs = S::broadcast(x[m * plan.stride + word * kPerWord + i]);
          LLMOS_UNROLL for (int v = 0; v < V; ++v) acc[m][v] = S::fma(weights[v], xs, acc[m][v]);
        }
      }
    }
    LLMOS_UNROLL for (int v = 0; v < V; ++v) {
      const F scale = S::load_floats(tile.scales + column + v * S::kLanes);
      LLMOS_UNROLL for (int m = 0; m < MR; ++m) sum[m][v] = S::fma(acc[m][v], scale, sum[m][v]);
    }
  }
  LLMOS_UNROLL for (int m = 0; m < MR; ++m) LLMOS_UNROLL for (int v = 0; v < V; ++v)
      S::store_floats(y + m * kColumns + panel * kPanel + v * S::kLanes, sum[m][v]);
}

template <class S, WeightFormat kFormat, bool kInteger>
struct Kernels {
  using Function = void (*)(const PackedTile<S>&, int, const Plan&, const Rows&, int64_t, float*);

  // The tile of `mr` rows (1..MR) and V vectors.
  template <int V, int MR = S::kRows>
  static Function of(int mr) {
    if constexpr (MR > 1)
      if (mr < MR) return of<V, MR - 1>(mr);
    if constexpr (kInteger)
      return &integer_tile<S, MR, V, is_4bit(kFormat)>;
    else
      return &float_tile<S, MR, V, kFormat>;
  }

  // All columns of the tile; narrow panels one by one where the last tile has fewer.
  static void run(const PackedTile<S>& tile, int panels, const Plan& plan, const Rows& rows,
                  int64_t row, int mr, float* y) {
    if (panels == PackedTile<S>::kPanels) return of<S::kVectors>(mr)(tile, 0, plan, rows, row, y);
    for (int p = 0; p < panels; ++p) of<kPanel / S::kLanes>(mr)(tile, p, plan, rows, row, y);
  }
};

template <class S>
auto tile_kernel(const QuantMatmul& c) {
  using W = WeightFormat;
  switch (c.weight.format) {
    case W::kInt8:
      return c.integer ? &Kernels<S, W::kInt8, true>::run : &Kernels<S, W::kInt8, false>::run;
    case W::kInt4:
      return c.integer ? &Kernels<S, W::kInt4, true>::run : &Kernels<S, W::kInt4, false>::run;
    case W::kInt4Asym:  // with int8 activations it differs from kInt4 only by its zero points
      return c.integer ? &Kernels<S, W::kInt4, true>::run : &Kernels<S, W::kInt4Asym, false>::run;
    case W::kNf4:
      return &Kernels<S, W::kNf4, false>::run;
    default:
      return &Kernels<S, W::kFp8, false>::run;
  }
}

template <typename T>
inline T* take(char*& memory, int64_t count) {
  T* taken = reinterpret_cast<T*>(memory);
  memory += ceil_div(count * sizeof(T), 64) * 64;
  return taken;
}

template <class S, typename T>
void run_typed(const QuantMatmul& c) {
  using Tile = PackedTile<S>;
  const int64_t n = c.weight.n, k = c.weight.k;
  const int per_word = is_4bit(c.weight.format) ? 8 : 4;
  Plan plan;
  plan.words = ceil_div(ceil_div(k, per_word), 16) * 16;  // whole 64 bytes for pack_panel
  plan.groups = groups(c.weight);
  plan.words_per_group = ceil_div(c.weight.group_size, per_word);
  plan.stride = plan.words * per_word;
  const auto kernel = tile_kernel<S>(c);

  const int64_t row_size = plan.stride * (c.integer ? 1 : sizeof(float));
  char* memory = static_cast<char*>(thread_scratch(
      Scratch::kRows, c.m * (row_size + sizeof(float) + plan.groups * sizeof(int32_t)) + 256));
  int8_t* integers = take<int8_t>(memory, c.m * row_size);
  float* floats = reinterpret_cast<float*>(integers);
  float* scales = take<float>(memory, c.m);
  int32_t* sums = take<int32_t>(memory, c.m * plan.groups);
  const Rows rows{integers, floats, sums, scales};

  const int64_t tiles = ceil_div(n, Tile::kColumns);
  const int64_t blocks = ceil_div(c.m, kBlock);
  const int64_t scale_count = plan.groups * Tile::kColumns;
  const int64_t tile_size = Tile::kPanels * plan.words * 64 + 2 * 4 * scale_count + 256;
  const T* x = static_cast<const T*>(c.x);
  T* out = static_cast<T*>(c.out);

  // A few rows are prepared by this thread alone: where cores are shared, a barrier more can cost
  // a time slice.
#pragma omp parallel for schedule(static) if (c.m * k > 1 << 15)
  for (int64_t row = 0; row < c.m; ++row)
    if (c.integer)
      quantize_row(x + row * k, k, per_word == 8, plan, c.weight.group_size,
                   integers + row * plan.stride, sums + row * plan.groups, scales + row);
    else
      widen_row(x + row * k, k, plan, floats + row * plan.stride);

#pragma omp parallel if (c.m * n * k > 1 << 16)
  {
    char* own = static_cast<char*>(thread_scratch(Scratch::kTile, tile_size));
    Tile tile;
    tile.panels = take<uint8_t>(own, Tile::kPanels * plan.words * 64);
    tile.scales = take<float>(own, scale_count);
    tile.zeros = take<int32_t>(own, scale_count);
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < tiles * blocks; ++task) {
      const int64_t first = task / blocks * Tile::kColumns;
      const int64_t count = S::min(n - first, Tile::kColumns);
      const int panels = static_cast<int>(ceil_div(count, kPanel));
      const int64_t end = S::min((task % blocks + 1) * kBlock, c.m);
      pack_tile<S>(c, plan, first, tile);
      alignas(64) float y[S::kRows * Tile::kColumns];
      for (int64_t row = task % blocks * kBlock; row < end; row += S::kRows) {
        const int mr = static_cast<int>(S::min(end - row, S::kRows));
        kernel(tile, panels, plan, rows, row, mr, y);
        for (int m = 0; m < mr; ++m)
          finish_row(c.activation, y + m * Tile::kColumns, c.bias ? c.bias + first : nullptr, count,
                     out + (row + m) * n + first);
      }
    }
  }
}

template <class S>
void run(const QuantMatmul& c) {
  if (c.bf16)
    run_typed<S, uint16_t>(c);
  else
    run_typed<S, float>(c);
}

}  // namespace
}  // namespace llmos
