// Register tiles of the quantized matmul over an instruction set S: MR rows of x by V vectors of
// weight rows. Include it inside a target region.
#pragma once

namespace llmos {
namespace {

// Accumulators stay in registers only where every loop over them is unrolled.
#define LLMOS_UNROLL _Pragma("GCC unroll 8")

// Bytes that a stream of weights is fetched ahead: hardware stops at the end of every 4 KiB page.
constexpr int64_t kAhead = 2048;

// What a task covers at most.
constexpr int kPanels = 4, kColumns = kPanels * kPanel;

// Weights of one register tile, from its first panel on. They are read where they are stored, or
// from staged levels, one k per word.
struct Weights {
  const uint8_t* words;
  int64_t word_stride, panel_stride;  // bytes
  const uint8_t* scales;              // of the panel: [groups][16], fp32 or bf16
  const uint8_t* zeros;               // likewise, or null
  int64_t groups;
  const uint8_t* fetch;  // words that are needed soon: of a panel for every two vectors
};

// Which part of the sums to take: groups [first, end), which have `words` words each and `count`
// together (the last one may be short). The first part starts from 0, later ones from y.
struct Part {
  int64_t first, end, words, count;
  bool starts;
};

// Byte offset of vector v, for rows of `bytes` each.
template <class S>
inline int64_t vector_offset(int v, int bytes, int64_t panel_stride) {
  const int row = v * S::kLanes;
  return row / kPanel * panel_stride + row % kPanel * bytes;
}

template <class S, WeightFormat kFormat>
inline typename S::F load_scales(const Weights& w, int64_t group, int v) {
  constexpr int bytes = is_4bit(kFormat) ? 2 : 4;
  const uint8_t* p = w.scales + group * kPanel * bytes +
                     vector_offset<S>(v, bytes, w.groups * kPanel * bytes);
  if constexpr (is_4bit(kFormat))
    return S::load_bf16(p);
  else
    return S::load_floats(reinterpret_cast<const float*>(p));
}

template <class S>
inline typename S::I load_zeros(const Weights& w, int64_t group, int v) {
  return S::widen_bytes(w.zeros + group * kPanel + vector_offset<S>(v, 1, w.groups * kPanel));
}

// y[MR][kColumns] for int8 activations; words and x (a strip of kStrip rows) begin where the part
// begins. Formats with one scale per row give the exact integers (as int32); the others apply the
// scales of their groups, of weights and x, and give fp32.
template <class S, int MR, int V, WeightFormat kFormat, int kStrip, bool kStreams>
void integer_tile(const Weights& w, const Part& part, const int8_t* x, const int32_t* offsets,
                  const float* x_scales, float* y) {
  using I = typename S::I;
  using F = typename S::F;
  constexpr bool k4Bit = is_4bit(kFormat);
  constexpr int kSteps = k4Bit ? 2 : 1;  // dot products per word
  // sums of groups that do not fit beside the accumulators stay in y
  constexpr bool kInRegisters = (2 * MR + 1) * V < S::kRegisters;
  F sum[MR][V];
  if constexpr (k4Bit && kInRegisters)
    LLMOS_UNROLL for (int m = 0; m < MR; ++m) LLMOS_UNROLL for (int v = 0; v < V; ++v) sum[m][v] =
        part.starts ? S::zero() : S::load_floats(y + m * kColumns + v * S::kLanes);
  for (int64_t g = part.first; g < part.end; ++g) {
    I acc[MR][V];
    LLMOS_UNROLL for (int m = 0; m < MR; ++m) {
      const int32_t offset = offsets[g * kStrip + m];
      LLMOS_UNROLL for (int v = 0; v < V; ++v) {
        if (!k4Bit && !part.starts)
          acc[m][v] = S::load_ints(reinterpret_cast<const int32_t*>(y) + m * kColumns +
                                   v * S::kLanes);
        else if (kFormat == WeightFormat::kInt4Asym)
          acc[m][v] = S::multiply(load_zeros<S>(w, g, v), offset);
        else
          acc[m][v] = S::broadcast_int(offset);
      }
    }
    const int64_t begin = (g - part.first) * part.words;
    const int64_t end = S::min(begin + part.words, part.count);
    for (int64_t word = begin; word < end; ++word) {
      const uint8_t* p = w.words + word * w.word_stride;
      I raw[V];
      LLMOS_UNROLL for (int v = 0; v < V; ++v) {
        const uint8_t* source = p + vector_offset<S>(v, 4, w.panel_stride);
        raw[v] = S::load_bytes(source);
        if (kStreams && MR > 2)
          __builtin_prefetch(source + kAhead);
        else if (v % 2 == 0)
          __builtin_prefetch(w.fetch + word * w.word_stride + v / 2 * w.panel_stride);
      }
      LLMOS_UNROLL for (int step = 0; step < kSteps; ++step) {
        LLMOS_UNROLL for (int m = 0; m < MR; ++m) {
          const I xs = S::broadcast_word(x + ((word * kSteps + step) * kStrip + m) * 4);
          LLMOS_UNROLL for (int v = 0; v < V; ++v) {
            const I codes = kSteps == 1 ? raw[v]
                            : step == 0 ? S::low_nibbles(raw[v])
                                        : S::high_nibbles(raw[v]);
            acc[m][v] = S::template dot<k4Bit>(acc[m][v], codes, xs);
          }
        }
      }
    }
    LLMOS_UNROLL for (int v = 0; v < V; ++v) {
      if constexpr (k4Bit) {
        const F scale = load_scales<S, kFormat>(w, g, v);
        LLMOS_UNROLL for (int m = 0; m < MR; ++m) {
          float* place = y + m * kColumns + v * S::kLanes;
          const F value = S::multiply(S::to_float(acc[m][v]),
                                      S::broadcast(x_scales[g * kStrip + m]));
          if constexpr (kInRegisters)
            sum[m][v] = S::fma(value, scale, sum[m][v]);
          else if (part.starts && g == part.first)
            S::store_floats(place, S::multiply(value, scale));
          else
            S::store_floats(place, S::fma(value, scale, S::load_floats(place)));
        }
      } else {
        LLMOS_UNROLL for (int m = 0; m < MR; ++m) S::store_ints(
            reinterpret_cast<int32_t*>(y) + m * kColumns + v * S::kLanes, acc[m][v]);
      }
    }
  }
  if constexpr (k4Bit && kInRegisters)
    LLMOS_UNROLL for (int m = 0; m < MR; ++m) LLMOS_UNROLL for (int v = 0; v < V; ++v)
        S::store_floats(y + m * kColumns + v * S::kLanes, sum[m][v]);
}

// A k of a staged block as a register tile reads it, or two of them in bf16.
using Pair = uint32_t;

// As integer_tile, with activations in floating point. X = float: stored weights are decoded in
// registers, staged ones are levels in fp32. X = Pair: staged only.
template <class S, int MR, int V, WeightFormat kFormat, int kStrip, bool kStaged, typename X>
void float_tile(const Weights& w, const Part& part, const X* x, float* y) {
  using F = typename S::F;
  constexpr bool kGrouped = is_4bit(kFormat);
  constexpr int kSteps = kStaged ? 1 : per_word(kFormat);
  const auto levels = S::template levels<kFormat>();
  F sum[MR][V];
  LLMOS_UNROLL for (int m = 0; m < MR; ++m) LLMOS_UNROLL for (int v = 0; v < V; ++v) sum[m][v] =
      part.starts ? S::zero() : S::load_floats(y + m * kColumns + v * S::kLanes);
  for (int64_t g = part.first; g < part.end; ++g) {
    F acc[MR][V];
    LLMOS_UNROLL for (int m = 0; m < MR; ++m) LLMOS_UNROLL for (int v = 0; v < V; ++v) acc[m][v] =
        kGrouped ? S::zero() : sum[m][v];
    F zeros[V];
    if constexpr (kFormat == WeightFormat::kInt4Asym && !kStaged)
      LLMOS_UNROLL for (int v = 0; v < V; ++v) zeros[v] = S::to_float(load_zeros<S>(w, g, v));
    const int64_t begin = (g - part.first) * part.words;
    const int64_t end = S::min(begin + part.words, part.count);
    for (int64_t word = begin; word < end; ++word) {
      const uint8_t* p = w.words + word * w.word_stride;
      LLMOS_UNROLL for (int step = 0; step < kSteps; ++step) {
        const X* xs = x + (word * kSteps + step) * kStrip;
        if constexpr (std::is_same_v<X, Pair>) {
          typename S::I weights[V];
          LLMOS_UNROLL for (int v = 0; v < V; ++v) weights[v] =
              S::load_bytes(p + vector_offset<S>(v, 4, w.panel_stride));
          LLMOS_UNROLL for (int m = 0; m < MR; ++m) {
            const auto pair = S::broadcast_word(reinterpret_cast<const int8_t*>(xs + m));
            LLMOS_UNROLL for (int v = 0; v < V; ++v) acc[m][v] =
                S::dot_pairs(acc[m][v], weights[v], pair);
          }
        } else {
          F weights[V];
          LLMOS_UNROLL for (int v = 0; v < V; ++v) {
            const uint8_t* source = p + vector_offset<S>(v, 4, w.panel_stride);
            if constexpr (kStaged) {
              weights[v] = S::load_floats(reinterpret_cast<const float*>(source));
            } else {
              weights[v] = S::template decode<kFormat>(S::load_bytes(source), step, levels);
              if constexpr (kFormat == WeightFormat::kInt4Asym)
                weights[v] = S::subtract(weights[v], zeros[v]);
            }
          }
          LLMOS_UNROLL for (int m = 0; m < MR; ++m) {
            const F value = S::broadcast(xs[m]);
            LLMOS_UNROLL for (int v = 0; v < V; ++v) acc[m][v] =
                S::fma(weights[v], value, acc[m][v]);
          }
        }
      }
    }
    LLMOS_UNROLL for (int v = 0; v < V; ++v) {
      if constexpr (kGrouped) {
        const F scale = load_scales<S, kFormat>(w, g, v);
        LLMOS_UNROLL for (int m = 0; m < MR; ++m) sum[m][v] = S::fma(acc[m][v], scale, sum[m][v]);
      } else {
        LLMOS_UNROLL for (int m = 0; m < MR; ++m) sum[m][v] = acc[m][v];
      }
    }
  }
  LLMOS_UNROLL for (int m = 0; m < MR; ++m) LLMOS_UNROLL for (int v = 0; v < V; ++v)
      S::store_floats(y + m * kColumns + v * S::kLanes, sum[m][v]);
}

}  // namespace
}  // namespace llmos
