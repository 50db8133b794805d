// out = a b + bias for any strides (Goto and van de Geijn 2008): panels of b are packed once for
// all threads, a block of rows of a by the thread that multiplies it, and a tile of sums stays in
// registers along a part of k. Sums are taken in the order of k, whatever the threads and blocks.

constexpr int64_t kPart = 384;                              // of k, in fp32 or pairs of bf16
constexpr int64_t kBlockRows = 96 / kTileRows * kTileRows;  // of a: 150 KB with a part of k
constexpr int64_t kPackedFloats = 1 << 21;                  // of b at a time

// Rows of a lie apart by what is no multiple of 4 KB: a cache could not hold 12 of those.
constexpr int64_t kPackedRow = kPart + kLanes;
// Or tiles of rows, in each k after k; a row's last store goes beyond its end.
constexpr int64_t kPackedTile = kPart * kTileRows + kLanes;

LLMOS_INLINE int64_t between(int64_t least, int64_t x, int64_t most) {
  return x > most ? (most > least ? most : least) : x > least ? x : least;
}

template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;
  Matrix part(int64_t row, int64_t column, int64_t row_count, int64_t column_count) const {
    return {data + row * row_stride + column * column_stride, row_count, column_count, row_stride,
            column_stride};
  }
};

// The elements of x in contiguous rows, for the rare x that has neither rows nor columns.
template <typename T>
static Matrix<T> copied(const Matrix<T>& x) {
  T* copy = reinterpret_cast<T*>(thread_scratch<1>().floats(x.rows * x.columns));
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t j = 0; j < x.columns; ++j)
      copy[i * x.columns + j] = x.data[i * x.row_stride + j * x.column_stride];
  return {copy, x.rows, x.columns, x.columns, 1};
}

// x: [k, columns], as panels.
template <typename E, typename T>
static void pack_panels(const Matrix<T>& x, E* out) {
  if (x.column_stride == 1)
    gather_factor(x.data, x.row_stride, x.rows, x.columns, out,
                  count_of(x.rows, elements_in<E>) * kPanel);
  else if (x.row_stride == 1)
    gather_columns(x.data, x.column_stride, x.columns, x.rows, out);
  else
    pack_panels(copied(x), out);
}

// x: [rows, k]. Returns whether tile by tile, in each k after k, as the columns of x lie; else row
// by row.
template <typename E, typename T>
static bool pack_rows(const Matrix<T>& x, E* out) {
  if (x.column_stride == 1) {
    gather_rows(x.data, x.row_stride, x.rows, x.columns, 1.0f, out, kPackedRow);
    return false;
  }
  if (x.row_stride != 1) return pack_rows(copied(x), out);
  for (int64_t k = 0; k < x.columns; k += elements_in<E>, out += kTileRows)
    for (int64_t tile = 0; tile * kTileRows < x.rows; ++tile) {
      const int64_t row = tile * kTileRows;
      prefetch_rows<elements_in<E>>(x.data + (k + kRowsAhead) * x.column_stride + row,
                                    x.column_stride);
      const auto vector = load_factor<E>(x.data + k * x.column_stride + row, x.column_stride,
                                         x.columns - k, x.rows - row);
      __builtin_memcpy(out + tile * kPackedTile, &vector, 64);
    }
  return true;
}

// The sum over k of 16 operands each, `step` apart.
template <typename E>
LLMOS_INLINE F sum_operands(const E* x, int64_t depth, int64_t step) {
  F sums = {};
  for (int64_t k = 0; k < depth; ++k, x += step) {
    const F operands = load(reinterpret_cast<const float*>(x));
    if constexpr (elements_in<E> == 1)
      sums += operands;
    else
      sums += as_float(as_bits(operands) << 16) + as_float(as_bits(operands) & 0xffff0000u);
  }
  return sums;
}

// sums [rows] = (or +=) the sums over k of rows that are packed tile by tile.
template <typename E>
static void sum_packed_rows(const E* a, int64_t rows, int64_t depth, bool add, float* sums) {
  for (int64_t m = 0; m < rows; m += kTileRows, a += kPackedTile) {
    const int64_t n = rows - m < kTileRows ? rows - m : kTileRows;
    for (int64_t i = 0; i < n; i += kLanes) {
      const F total = sum_operands(a + i, depth, kTileRows);
      const int64_t count = n - i;
      store(sums + m + i, add ? total + load(sums + m + i, count) : total, count);
    }
  }
}

// Where the sums of a tile go: to `sums`, on top of what other parts of k gave, or, as the last
// part's and with the bias, to `out`, there where `add` on top of what it holds.
template <typename T, typename O>
struct Destination {
  float* sums;
  int64_t sums_row;
  bool accumulate;
  O* out;  // null: to sums
  int64_t out_row;
  bool add;
  const T* bias;
};

template <typename O>
LLMOS_INLINE void store_sums(F sums, bool add, int64_t n, O* out) {
  store(out, add ? sums + load(out, n) : sums, n);
}

template <bool by_tile, int tile_rows, int vectors, typename T, typename O, typename E>
LLMOS_INLINE void product_tile(int64_t rows, int64_t columns, int64_t depth, const E* a, const E* b,
                               const Destination<T, O>& to, int64_t row, int64_t column) {
  float* c = to.sums + row * to.sums_row + column;
  R sums[tile_rows][vectors * kRegisters];
  load_tile(c, to.sums_row, to.accumulate, sums);
  add_tile(depth, a, by_tile ? 1 : kPackedRow, by_tile ? kTileRows : 1, b, sums);
  if (to.out == nullptr) return store_tile(c, to.sums_row, sums);
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const int64_t n = columns - v * kLanes;
    const F bias = to.bias ? load(to.bias + column + v * kLanes, n) : F{};
#pragma GCC unroll 16
    for (int m = 0; m < tile_rows; ++m) {
      // no `break` at the last row: gcc 12 would keep the sums in memory, at two thirds of the
      // speed
      F value;
      __builtin_memcpy(&value, &sums[m][v * kRegisters], sizeof value);
      if (m < rows)
        store_sums(value + bias, to.add, n, to.out + (row + m) * to.out_row + column + v * kLanes);
    }
  }
}

template <bool by_tile, int vectors, typename T, typename O, typename E>
static void product_panel(int64_t rows, int64_t columns, int64_t depth, const E* a, const E* b,
                          const Destination<T, O>& to, int64_t column) {
  for (int64_t m = 0; m < rows; m += kTileRows) {
    const E* tile = a + (by_tile ? m / kTileRows * kPackedTile : m * kPackedRow);
    const int64_t left = rows - m;
    if (left > 2 * kRowStep)
      product_tile<by_tile, kTileRows, vectors>(left, columns, depth, tile, b, to, m, column);
    else if (left > kRowStep)
      product_tile<by_tile, 2 * kRowStep, vectors>(left, columns, depth, tile, b, to, m, column);
    else
      product_tile<by_tile, kRowStep, vectors>(left, columns, depth, tile, b, to, m, column);
  }
}

template <bool by_tile, typename T, typename O, typename E>
static void product_panels(int64_t rows, int64_t columns, int64_t depth, const E* a, const E* b,
                           const Destination<T, O>& to) {
  for (int64_t n = 0; n < columns; n += kPanel)
    if (columns - n > kLanes)
      product_panel<by_tile, kTileVectors>(rows, columns - n, depth, a, b + n * depth, to, n);
    else
      product_panel<by_tile, 1>(rows, columns - n, depth, a, b + n * depth, to, n);
}

// How a product is cut: of b, `step` columns along `parts_at_once` parts of k are packed at a time.
struct ProductPlan {
  int64_t per;  // elements in an operand
  int64_t depth, step, parts, parts_at_once, tiles, blocks;

  ProductPlan(const Product& call, int64_t per_) : per(per_), depth(call.depth) {
    const int64_t operands = count_of(depth, per);
    parts = operands == 0 ? 1 : (operands + kPart - 1) / kPart;
    const int64_t most = between(1024, kPackedFloats / (operands + 1), call.columns);
    const int64_t pieces = (call.columns + most - 1) / most;
    step = round_up((call.columns + pieces - 1) / pieces, kPanel);
    parts_at_once = between(1, kPackedFloats / (kPart * step), parts);
    tiles = (call.rows + kTileRows - 1) / kTileRows;
    // as many blocks for each thread
    blocks = round_up((call.rows + kBlockRows - 1) / kBlockRows, omp_get_max_threads());
  }
  int64_t k(int64_t part) const { return part * kPart * per; }
  int64_t length(int64_t part) const { return between(0, depth - k(part), kPart * per); }
};

// What lies packed in memory: `columns` columns from `column` on, parts `first` to `last`.
template <typename E>
struct PackedPanels {
  E* memory;
  const ProductPlan& plan;
  int64_t column, columns, first, last;

  int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
  E* panel(int64_t part, int64_t index) const {
    const int64_t operands = count_of(plan.length(part), plan.per);
    return memory + ((part - first) * kPart * panels() + index * operands) * kPanel;
  }
};

// Packs the panels [begin, end) of a part of k.
template <typename T, typename E>
static void pack_group(const Matrix<T>& b, const PackedPanels<E>& packed, int64_t part,
                       int64_t begin, int64_t end) {
  const int64_t column = begin * kPanel;
  pack_panels(b.part(packed.plan.k(part), packed.column + column, packed.plan.length(part),
                     between(0, end * kPanel, packed.columns) - column),
              packed.panel(part, begin));
}

// Multiplies a block of rows by the panels [begin, end), and finishes it after the last part of k.
// Sums that wait for more parts lie in `shared`, [rows, step].
template <typename T, typename O, typename E>
static void multiply_block(const Product& call, const Matrix<T>& a, const PackedPanels<E>& packed,
                           int64_t block, int64_t begin, int64_t end, float* shared) {
  const ProductPlan& plan = packed.plan;
  const int64_t row = plan.tiles * block / plan.blocks * kTileRows, column = begin * kPanel;
  const int64_t rows =
      between(0, plan.tiles * (block + 1) / plan.blocks * kTileRows, call.rows) - row;
  const int64_t columns = between(0, end * kPanel, packed.columns) - column;
  constexpr int64_t packed_floats = kBlockRows * (kPackedRow + kLanes);
  float* scratch = thread_scratch().floats(packed_floats + (shared ? 0 : kBlockRows * plan.step));
  E* packed_a = reinterpret_cast<E*>(scratch);
  Destination<T, O> to = {};
  to.sums = shared ? shared + row * plan.step + column : scratch + packed_floats;
  to.sums_row = plan.step;
  for (int64_t part = packed.first; part < packed.last; ++part) {
    const int64_t length = plan.length(part), depth = count_of(length, plan.per);
    to.accumulate = part > 0;
    if (part + 1 == plan.parts && call.finish == Finish::none) {
      to.out_row = call.columns;
      to.add = call.add;
      to.out = row_of<O>(call.out, row, to.out_row) + packed.column + column;
      to.bias = call.bias ? static_cast<const T*>(call.bias) + packed.column + column : nullptr;
    }
    if (pack_rows(a.part(row, plan.k(part), rows, length), packed_a)) {
      product_panels<true>(rows, columns, depth, packed_a, packed.panel(part, begin), to);
      if (call.row_sums && packed.column + column == 0)
        sum_packed_rows(packed_a, rows, depth, call.add || part > 0, call.row_sums + row);
    } else {
      product_panels<false>(rows, columns, depth, packed_a, packed.panel(part, begin), to);
    }
  }
  if (packed.last == plan.parts && call.finish != Finish::none)
    finish_block<T>(call, {row, rows, packed.column + column, columns}, to.sums, plan.step);
}

// T of a and the bias, S of b, O of out.
template <typename T, typename S, typename O>
static void product_of(const Product& call) {
  if (call.rows == 0 || call.columns == 0) return;
  using E = typename OperandOf<T>::Type;
  const Matrix<T> a = {static_cast<const T*>(call.a), call.rows, call.depth, call.a_row,
                       call.a_depth};
  const Matrix<S> b = {static_cast<const S*>(call.b), call.depth, call.columns, call.b_depth,
                       call.b_column};
  const ProductPlan plan(call, elements_in<E>);
  float* panels = thread_scratch<2>().floats(plan.parts_at_once * kPart * plan.step);
  float* shared = plan.parts_at_once == plan.parts
                      ? nullptr
                      : thread_scratch<3>().floats(plan.tiles * kTileRows * plan.step);
  PackedPanels<E> packed = {reinterpret_cast<E*>(panels), plan, 0, 0, 0, 0};
  for (; packed.column < call.columns; packed.column += plan.step)
    for (packed.first = 0; packed.first < plan.parts; packed.first = packed.last) {
      packed.columns = between(0, call.columns - packed.column, plan.step);
      packed.last = between(0, packed.first + plan.parts_at_once, plan.parts);
      const int64_t count = packed.panels(), threads = omp_get_max_threads();
      const int64_t parts = packed.last - packed.first;
      // enough units for threads that come and go, of at most and at least 8 panels
      const int64_t group = between(1, count * parts / (4 * threads), 8);
      const int64_t groups = (count + group - 1) / group;
      const int64_t cuts = between(1, 4 * threads / plan.blocks, count / 8);
#pragma omp parallel if (call.rows * packed.columns * call.depth > 64 * kWorthThreads)
      {
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < groups * parts; ++unit)
          pack_group(b, packed, packed.first + unit / groups, unit % groups * group,
                     between(0, unit % groups * group + group, count));
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < plan.blocks * cuts; ++unit)
          multiply_block<T, O>(call, a, packed, unit / cuts, count * (unit % cuts) / cuts,
                               count * (unit % cuts + 1) / cuts, shared);
      }
    }
}

static void product(const Product& call) {
  if (call.type == DType::f32) return product_of<float, float, float>(call);
  if (call.b_type == DType::f32) return product_of<bf16, float, bf16>(call);
  call.out_type == DType::f32 ? product_of<bf16, bf16, float>(call)
                              : product_of<bf16, bf16, bf16>(call);
}
