// The quantized matmul, written once over an instruction set S. Include it inside a target region.
//
// Work is cut into tasks of up to 4 panels (64 weight rows) by kBlockRows rows of x. A few rows of
// x stream through the weights, each word read once. For more rows, kBlockK columns of the weights
// at a time stay in the L1 cache while all rows of the task run over them, S::kRows at a time, and
// the next columns are on their way. Codes are unpacked in registers; fp32 levels, which cost more,
// are staged once per block.
//
// S gives: I, F (vectors of kLanes int32 / float), kRegisters, the register tiles of blocks (kRows
// by kVectors, or by kGroupedVectors) and of streams (kStreamRows, stream_vectors(rows)), and small
// functions.
#pragma once

namespace llmos {
namespace {

constexpr int64_t kBlockRows = 516;  // a multiple of every S::kRows

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The calling thread holds the rows of x while it runs tasks of its own.
constexpr int kTaskScratch = 0, kRowsScratch = 1;

template <int slot>
char* scratch_bytes(int64_t bytes) {
  const int64_t floats = ceil_div(bytes, sizeof(float));
  return reinterpret_cast<char*>(thread_scratch<slot>().floats(floats));
}

template <typename T>
inline T* take(char*& memory, int64_t count) {
  T* taken = reinterpret_cast<T*>(memory);
  memory += ceil_div(count * sizeof(T), 64) * 64;
  return taken;
}

// Columns of a block: whole groups; up to 24 KiB as they are stored, or 32 KiB of fp32.
constexpr int64_t block_k(bool integer) { return integer ? 384 : 128; }

// Rows [row, row + rows) of x by `panels` panels from `panel` on.
struct Task {
  int64_t panel, row, rows;
  int panels;
};

// What is multiplied: int8, fp32, or pairs of bf16.
enum class Kind { kInteger, kFloat, kPairs };

template <class S, WeightFormat kFormat, Kind kKind, typename T>
struct Product {
  static constexpr bool kInteger = kKind == Kind::kInteger;
  static constexpr int kPerWord = per_word(kFormat);
  static constexpr int kPanelVectors = kPanel / S::kLanes;
  static constexpr int kScaleBytes = is_4bit(kFormat) ? 2 : 4;
  static constexpr int64_t kBlockK = block_k(kInteger);

  const QuantMatmul& call;
  const Plan& plan;
  const Rows& rows;
  float* stage;  // levels of a block: [k][kColumns], or two k in the place of one
  float* y;      // [rows of the task][kColumns]

  // `next` is what this thread will run after `task`.
  void run(const Task& task, const Task& next) const {
    if constexpr (kKind != Kind::kPairs && kFormat != WeightFormat::kFp8)
      if (plan.streams) return stream(task);
    blocks(task, next);
  }

 private:
  Weights stored(int64_t panel, int64_t word) const {
    const uint8_t* words = call.packed + (panel * plan.words + word) * kPanel * 4;
    return {words,
            kPanel * 4,
            plan.words * kPanel * 4,
            static_cast<const uint8_t*>(call.scales) + panel * plan.groups * kPanel * kScaleBytes,
            call.zeros ? call.zeros + panel * plan.groups * kPanel : nullptr,
            plan.groups,
            words};
  }

  // Panel `p` of a task's block that begins with `word`, as tiles read it: staged, unless codes are
  // unpacked in registers.
  Weights operand(int64_t panel, int p, int64_t word) const {
    Weights w = stored(panel + p, word);
    if (!kInteger) {
      w.words = reinterpret_cast<const uint8_t*>(stage + p * kPanel);
      w.word_stride = kColumns * sizeof(float);
      w.panel_stride = kPanel * sizeof(float);
    }
    return w;
  }

  // Row `row` begins a strip of kStrip rows, of which MR exist.
  template <int MR, int V, int kStrip, bool kStaged>
  void tile(const Weights& w, const Part& part, int64_t row, int64_t k, float* out) const {
    const int64_t x = row * plan.depth + k * kStrip;
    if constexpr (kKind == Kind::kPairs)
      float_tile<S, MR, V, kFormat, kStrip, true>(w, part, rows.pairs + x / 2, out);
    else if constexpr (kInteger)
      integer_tile<S, MR, V, kFormat, kStrip, !kStaged>(w, part, rows.integers + x,
                                                        rows.offsets + row * plan.groups,
                                                        rows.scales + row * plan.groups, out);
    else
      float_tile<S, MR, V, kFormat, kStrip, kStaged>(w, part, rows.floats + x, out);
  }

  template <int MR = S::kStreamRows>
  void stream(const Task& task) const {
    if constexpr (MR > 1)
      if (task.rows < MR) return stream<MR - 1>(task);
    constexpr int V = S::stream_vectors(MR, is_4bit(kFormat)), kStep = V / kPanelVectors;
    const Part all{0, plan.groups, plan.words_per_group, plan.words, true};
    int p = 0;
    for (; p + kStep <= task.panels; p += kStep)
      tile<MR, V, MR, false>(stored(task.panel + p, 0), all, task.row, 0, y + p * kPanel);
    for (; p < task.panels; ++p)
      tile<MR, kPanelVectors, MR, false>(stored(task.panel + p, 0), all, task.row, 0,
                                         y + p * kPanel);
    finish(task, 0, MR);
  }

  void blocks(const Task& task, const Task& next) const {
    // words of a tile per stored word
    constexpr int kSteps = kInteger ? 1 : kKind == Kind::kPairs ? kPerWord / 2 : kPerWord;
    for (int64_t k = 0; k < call.weight.k; k += kBlockK) {
      const int64_t word = k / kPerWord;
      const int64_t count = S::min(kBlockK / kPerWord, plan.words - word);
      if constexpr (kFormat == WeightFormat::kFp8)
        stage_rows(task, k);
      else if constexpr (!kInteger)
        stage_panels(task, word, count);
      Part part{0, 1, count * kSteps, count * kSteps, k == 0};
      if (is_4bit(kFormat)) {
        part.first = k / call.weight.group_size;
        part.end = S::min(plan.groups, part.first + kBlockK / call.weight.group_size);
        part.words = plan.words_per_group * kSteps;
      }
      const bool last = word + count == plan.words;
      const Weights following = stored(last ? next.panel : task.panel, last ? 0 : word + count);
      for (int64_t row = 0; row < task.rows; row += S::kRows) {
        strip(task, part, word, row, k, following);
        // while its sums are at hand, and the stores wait for memory beside the next products
        if (last) finish(task, row, S::min(S::kRows, task.rows - row));
      }
    }
  }

  void finish(const Task& task, int64_t row, int64_t count) const {
    constexpr bool kIntegers = kInteger && !is_4bit(kFormat);
    const float* row_scales = is_4bit(kFormat) ? nullptr : static_cast<const float*>(call.scales);
    for (int64_t end = row + count; row < end; ++row) {
      const float x_scale = kIntegers ? rows.scales[task.row + row] : 1.0f;
      finish_row<T>(call,
                    Sums{y + row * kColumns, task.panel * kPanel, task.panels * kPanel, kIntegers,
                         row_scales, x_scale},
                    task.row + row);
    }
  }

  template <int MR = S::kRows>
  void strip(const Task& task, const Part& part, int64_t word, int64_t row, int64_t k,
             const Weights& following) const {
    if constexpr (MR > 1)
      if (task.rows - row < MR) return strip<MR - 1>(task, part, word, row, k, following);
    // with groups, fewer vectors: their sums then stay in registers beside the accumulators
    constexpr int V = is_4bit(kFormat) && kInteger ? S::kGroupedVectors : S::kVectors;
    constexpr int kStep = V / kPanelVectors;
    float* out = y + row * kColumns;
    int p = 0;
    for (; p + kStep <= task.panels; p += kStep) {
      Weights w = operand(task.panel, p, word);
      w.fetch = fetch<V>(task, row, p, w, following);
      tile<MR, V, S::kRows, true>(w, part, task.row + row, k, out + p * kPanel);
    }
    for (; p < task.panels; ++p)
      tile<MR, kPanelVectors, S::kRows, true>(operand(task.panel, p, word), part, task.row + row, k,
                                              out + p * kPanel);
  }

  // What the tile of V vectors at (row, p) fetches of the block that is next: V / 2 panels or
  // nothing. The tiles of a block share its panels, so that they arrive as fast as they are used.
  template <int V>
  const uint8_t* fetch(const Task& task, int64_t row, int p, const Weights& w,
                       const Weights& following) const {
    if constexpr (kPanelVectors > 2 || V < 2 || kFormat == WeightFormat::kFp8) return w.words;
    const int64_t per_strip = task.panels * kPanelVectors / V, units = task.panels * 2 / V;
    const int64_t tiles = ceil_div(task.rows, S::kRows) * per_strip;
    const int64_t tile = row / S::kRows * per_strip + p * kPanelVectors / V;
    const int64_t unit = ceil_div(tile * units, tiles);
    if (unit * tiles / units != tile) return w.words;
    return following.words + unit * (V / 2) * following.panel_stride;
  }

  void stage_panels(const Task& task, int64_t word, int64_t count) const {
    auto levels = S::template levels<kFormat>();
    if constexpr (kKind == Kind::kPairs) levels = S::rounded_to_bf16(levels);
    for (int p = 0; p < task.panels; ++p) {
      const Weights w = stored(task.panel + p, word);
      for (int v = 0; v < kPanelVectors; ++v)
        for (int64_t i = 0; i < count; ++i) {
          const int64_t offset = v * S::kLanes;
          const auto raw = S::load_bytes(w.words + i * w.word_stride + offset * 4);
          auto zero = S::zero();
          if constexpr (kFormat == WeightFormat::kInt4Asym)
            zero = S::to_float(load_zeros<S>(w, (word + i) / plan.words_per_group, v));
          const auto level = [&](int step) {
            return S::subtract(S::template decode<kFormat>(raw, step, levels), zero);
          };
          float* out = stage + p * kPanel + offset;
          if constexpr (kKind == Kind::kPairs)
            LLMOS_UNROLL for (int step = 0; step < kPerWord; step += 2) S::store_bytes(
                reinterpret_cast<uint8_t*>(out + (i * kPerWord + step) / 2 * kColumns),
                S::pair(level(step), level(step + 1)));
          else
            LLMOS_UNROLL for (int step = 0; step < kPerWord; ++step)
                S::store_floats(out + (i * kPerWord + step) * kColumns, level(step));
        }
    }
  }

  // fp8 is stored in rows, for GPUs.
  void stage_rows(const Task& task, int64_t k) const {
    float table[256];
    for (int code = 0; code < 256; ++code) table[code] = fp8_value(code);
    const int64_t count = S::min(kBlockK, call.weight.k - k), first = task.panel * kPanel;
    for (int64_t i = 0; i < task.panels * kPanel; ++i) {
      const uint8_t* codes = call.packed + (first + i) * call.weight.k + k;
      for (int64_t j = 0; j < ceil_div(count, kPerWord) * kPerWord; ++j)
        stage[j * kColumns + i] = first + i < call.weight.n && j < count ? table[codes[j]] : 0.0f;
    }
  }
};

// How the work is cut: enough tasks for every thread, but no thinner than that, because a block of
// weights pays by the rows that run over it and a strip of x by the columns.
struct Cut {
  int64_t rows, row_blocks, tiles;
  int width;  // panels
  int64_t panels, m;

  Cut(const QuantMatmul& call, int strip) : panels(ceil_div(call.weight.n, kPanel)), m(call.m) {
    const int64_t enough = 2 * omp_get_max_threads();
    rows = m < kBlockRows ? m : kBlockRows;
    while (rows > 16 * strip && ceil_div(panels, kPanels) * ceil_div(m, rows) < enough)
      rows = ceil_div(rows, 2 * strip) * strip;
    row_blocks = ceil_div(m, rows);
    width = kPanels;
    while (width > (call.gated ? 2 : 1) && ceil_div(panels, width) * row_blocks < enough)
      width /= 2;
    tiles = ceil_div(panels, width);
  }

  int64_t tasks() const { return tiles * row_blocks; }

  Task task(int64_t index) const {
    const int64_t panel = index / row_blocks * width, row = index % row_blocks * rows;
    const int64_t panels_left = panels - panel, rows_left = m - row;
    return {panel, row, rows < rows_left ? rows : rows_left,
            static_cast<int>(width < panels_left ? width : panels_left)};
  }
};

template <class S, WeightFormat kFormat, Kind kKind, typename T>
void run_format(const QuantMatmul& call, const Plan& plan, const Rows& rows) {
  const Cut cut(call, S::kRows);
  const int64_t stage_size = kKind == Kind::kInteger ? 0 : (block_k(false) + kPanel) * kColumns;
  const int64_t y_size = cut.rows * kColumns;
  std::atomic<int64_t> taken{0};

#pragma omp parallel if (call.m * call.weight.n * call.weight.k > 1 << 16)
  {
    char* own = scratch_bytes<kTaskScratch>((stage_size + y_size) * sizeof(float) + 128);
    float* stage = take<float>(own, stage_size);
    float* y = take<float>(own, y_size);
    const Product<S, kFormat, kKind, T> product{call, plan, rows, stage, y};
    // a thread takes its next task before it runs the present one, to prefetch for it
    int64_t next = taken++;
    while (next < cut.tasks()) {
      const Task task = cut.task(next);
      next = taken++;
      product.run(task, cut.task(next < cut.tasks() ? next : 0));
    }
  }
}

template <class S, Kind kKind, typename T>
void run_prepared(const QuantMatmul& call, const Plan& plan, const Rows& rows) {
  using W = WeightFormat;
  switch (call.weight.format) {
    case W::kInt8:
      return run_format<S, W::kInt8, kKind, T>(call, plan, rows);
    case W::kInt4:
      return run_format<S, W::kInt4, kKind, T>(call, plan, rows);
    case W::kInt4Asym:
      return run_format<S, W::kInt4Asym, kKind, T>(call, plan, rows);
    default:
      break;
  }
  if constexpr (kKind != Kind::kInteger)
    if (call.weight.format == W::kNf4) return run_format<S, W::kNf4, kKind, T>(call, plan, rows);
  if constexpr (kKind == Kind::kFloat) run_format<S, W::kFp8, kKind, T>(call, plan, rows);
}

// Prepare rows of x with `prepare(x, first row of its strip, place in it)`, and multiply.
template <class S, Kind kKind, typename T, typename Prepare>
void run_kind(const QuantMatmul& call, const Plan& plan, const Rows& rows, Prepare prepare) {
  // A few rows are prepared by this thread alone: where cores are shared, a barrier more can cost
  // a time slice.
#pragma omp parallel for schedule(static) if (call.m * call.weight.k > 1 << 15)
  for (int64_t row = 0; row < call.m; ++row)
    prepare(static_cast<const T*>(call.x) + row * call.x_stride, row / plan.strip * plan.strip,
            row % plan.strip);
  run_prepared<S, kKind, T>(call, plan, rows);
}

template <class S, typename T>
void run_typed(const QuantMatmul& call) {
  const int64_t m = call.m, k = call.weight.k;
  const bool fp8 = call.weight.format == WeightFormat::kFp8;
  const bool integer = call.rounds && !fp8;
  Plan plan;
  plan.words = words(call.weight);
  plan.groups = groups(call.weight);
  plan.words_per_group = ceil_div(call.weight.group_size, per_word(call.weight.format));
  plan.streams = m <= S::kStreamRows && !fp8;
  plan.strip = plan.streams ? m : S::kRows;
  plan.depth = ceil_div(k, 64) * 64;
  constexpr bool kPairs = S::kPairs && std::is_same_v<T, lanes::bf16>;
  const bool pairs = kPairs && !integer && !plan.streams && !fp8;

  const int64_t filled = ceil_div(m, plan.strip) * plan.strip;  // rows
  const int64_t x_size = filled * plan.depth * (integer ? 1 : pairs ? 2 : 4);
  char* memory = scratch_bytes<kRowsScratch>(x_size + 2 * filled * plan.groups * 4 + 256);
  int8_t* integers = take<int8_t>(memory, x_size);
  float* floats = reinterpret_cast<float*>(integers);
  Pair* words = reinterpret_cast<Pair*>(integers);
  float* scales = take<float>(memory, filled * plan.groups);
  int32_t* offsets = take<int32_t>(memory, filled * plan.groups);
  const Rows rows{integers, floats, words, offsets, scales};

  if (integer)
    return run_kind<S, Kind::kInteger, T>(
        call, plan, rows, [&](const T* x, int64_t strip, int64_t place) {
          const int64_t first = strip * plan.groups + place;
          quantize_row<typename S::Rounding>(x, call, plan,
                                             integers + strip * plan.depth + place * 4,
                                             offsets + first, scales + first);
        });
  if constexpr (kPairs)
    if (pairs)
      return run_kind<S, Kind::kPairs, T>(
          call, plan, rows, [&](const T* x, int64_t strip, int64_t place) {
            pair_row(x, k, plan, words + strip * plan.depth / 2 + place);
          });
  run_kind<S, Kind::kFloat, T>(call, plan, rows, [&](const T* x, int64_t strip, int64_t place) {
    float* out = floats + strip * plan.depth + place;
    if (call.rounds)
      e4m3_row<typename S::Rounding>(x, k, plan, out);
    else
      float_row(x, k, plan, out, [](lanes::F values) { return values; });
  });
}

template <class S>
void run(const QuantMatmul& call) {
  if (call.bf16)
    run_typed<S, lanes::bf16>(call);
  else
    run_typed<S, float>(call);
}

}  // namespace
}  // namespace llmos
