"""What happens to a tile of scores between the two products, once for all attention kernels.

B H M N: batch, head, query row, key column. A tile has its rows along the first dimension and its
columns along the second, or is transposed: ``rows`` and ``columns`` are [M, 1] and [1, N], or
[1, M] and [N, 1], and everything broadcasts. Scores are in base 2: exp2 is what the GPU has.
"""

import triton
import triton.language as tl

from .philox import kept
from .runtime import wide

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def schedule(tiles, heads, section, LAST_FIRST: tl.constexpr):
    """(tile, batch * head) of this program, the longest work first.

    Heads are taken in sections whose keys and values fit the L2 cache together; within a section
    all heads' longest tiles start before the shorter ones.
    """
    pid = tl.program_id(0)
    first = pid // (section * tiles) * section
    width = tl.minimum(section, heads - first)
    inside = pid % (section * tiles)
    tile = inside // width
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile, first + inside % width


@triton.jit
def locate(sequences, batch):
    """(first query row, queries, first key row, keys, shift) of a sequence, never out of bounds."""
    if sequences.cu_q is None:
        start_q = 0
        start_k = 0
        len_q = sequences.rows_q
        len_k = sequences.rows_k
        if sequences.key_lengths is not None:
            given = tl.load(sequences.key_lengths + batch)
            len_k = tl.minimum(tl.maximum(given, 0), sequences.rows_k).to(tl.int32)
    else:
        start_q = _boundary(sequences.cu_q, batch, sequences.rows_q)
        start_k = _boundary(sequences.cu_k, batch, sequences.rows_k)
        len_q = tl.maximum(_boundary(sequences.cu_q, batch + 1, sequences.rows_q) - start_q, 0)
        len_k = tl.maximum(_boundary(sequences.cu_k, batch + 1, sequences.rows_k) - start_k, 0)
    shift = 0
    if sequences.bottom_right is not None:
        shift = len_k - len_q
    return start_q, len_q, start_k, len_k, shift


@triton.jit
def _boundary(cumulative, index, rows):
    return tl.minimum(tl.maximum(tl.load(cumulative + index), 0), rows).to(tl.int32)


@triton.jit
def statistics_row(sequences, batch, head, start_q):
    """Where the first row of a sequence stands in lse and delta, and among the dropout rows."""
    if sequences.cu_q is None:
        row = wide(batch * sequences.heads_q + head) * sequences.rows_q
    else:
        row = wide(head) * sequences.rows_q + start_q
    return row


@triton.jit
def with_sink(lse, sinks, head):
    """Log-sum-exp of a row's keys and of the head's sink; ``lse``, that of the keys, is finite."""
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        larger = tl.maximum(lse, sink)
        lse = larger + tl.log(1.0 + tl.exp(tl.minimum(lse, sink) - larger))
    return lse


@triton.jit
def visible_columns(first_row, last_row, len_k, shift, scores):
    """[low, high) of the columns that any of the rows may attend to."""
    low = 0
    high = len_k
    if scores.left is not None:
        low = tl.maximum(first_row + shift - scores.left, 0)
    if scores.right is not None:
        high = tl.maximum(tl.minimum(last_row + shift + scores.right + 1, len_k), 0)
    return low, high


@triton.jit
def visible_rows(first_column, last_column, len_q, shift, scores):
    """[low, high) of the rows that may attend to any of the columns."""
    low = 0
    high = len_q
    if scores.right is not None:
        low = tl.maximum(first_column - shift - scores.right, 0)
    if scores.left is not None:
        high = tl.maximum(tl.minimum(last_column - shift + scores.left + 1, len_q), 0)
    return low, high


@triton.jit
def hides_some(first_row, first_column, len_k, shift, scores, M: tl.constexpr, N: tl.constexpr):
    """Whether a tile holds pairs that are hidden; tiles inside the window need no mask."""
    some = first_column + N > len_k
    if scores.right is not None:
        some = some | (first_column + N - 1 > first_row + shift + scores.right)
    if scores.left is not None:
        some = some | (first_column < first_row + M - 1 + shift - scores.left)
    if scores.masked is not None:
        some = some | True
    return some


@triton.jit
def visible(rows, columns, len_q, len_k, shift, batch, head, scores):
    """Bool, broadcastable to the tile: who may attend to whom."""
    allowed = columns < len_k
    distance = columns - rows - shift
    if scores.right is not None:
        allowed = allowed & (distance <= scores.right)
    if scores.left is not None:
        allowed = allowed & (distance >= -scores.left)
    if scores.masked is not None:
        allowed = allowed & (load_plane(scores.mask, rows, columns, len_q, len_k, batch, head) != 0)
    return allowed


@triton.jit
def load_plane(plane, rows, columns, len_q, len_k, batch, head):
    """A tile of a mask or bias, 0 outside; a dimension that is broadcast is loaded once."""
    base = plane.ptr + wide(batch) * plane.batch_stride
    base += wide(head) * plane.head_stride
    if plane.row_stride is not None:
        row_pointers = base + wide(rows) * plane.row_stride
        if plane.column_stride is not None:
            inside = (rows < len_q) & (columns < len_k)
            pointers = row_pointers + wide(columns) * plane.column_stride
            tile = tl.load(pointers, mask=inside, other=0)
        else:
            tile = tl.load(row_pointers, mask=rows < len_q, other=0)
    elif plane.column_stride is not None:
        pointers = base + wide(columns) * plane.column_stride
        tile = tl.load(pointers, mask=columns < len_k, other=0)
    else:
        tile = tl.load(base)
    return tile


@triton.jit
def transform(raw, rows, columns, len_q, len_k, shift, batch, head, scores):
    """(scores, slope) of a tile of products.

    Scores are in base 2, or still to be multiplied by ``score_factor`` where they fold; slope is
    the softcap's derivative.
    """
    slope = 1.0
    if scores.folds is None:
        raw = raw * scores.scale
        if scores.softcap is not None:
            capped = tanh(raw / scores.softcap)
            slope = 1.0 - capped * capped
            raw = scores.softcap * capped
        raw = raw * LOG2E
        if scores.biased is not None:
            bias = load_plane(scores.bias, rows, columns, len_q, len_k, batch, head)
            raw = raw + bias.to(tl.float32) * LOG2E
        if scores.alibi is not None:
            slopes = scores.alibi + batch * scores.alibi_batch_stride + head
            raw = raw - tl.load(slopes) * LOG2E * tl.abs(columns - rows - shift)
    return raw, slope


@triton.jit
def tanh(x):
    """To fp32 accuracy also near 0, where 1 - 2 / (e^2x + 1) cancels: there its Taylor series."""
    square = x * x
    series = -1382.0 / 155925.0 * square + 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    # exp2 of a large number is inf and tanh 1, as it should be
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(square < 0.125, x * (series * square + 1.0), far)


@triton.jit
def score_factor(scores):
    """What the scores of ``transform`` still lack: it is folded into the exponent."""
    factor = 1.0
    if scores.folds is not None:
        factor = scores.scale * LOG2E
    return factor


@triton.jit
def probabilities(
    s, lse2, rows, columns, first_row, first_column,
    len_q, len_k, shift, batch, head, scores, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """(p, slope) of a tile of products whose rows' log-sum-exps are known, before dropout."""
    s, slope = transform(s, rows, columns, len_q, len_k, shift, batch, head, scores)
    if hides_some(first_row, first_column, len_k, shift, scores, M, N):
        allowed = visible(rows, columns, len_q, len_k, shift, batch, head, scores)
        s = tl.where(allowed, s, float("-inf"))
    return tl.exp2(s * score_factor(scores) - lse2), slope


@triton.jit
def score_gradients(p, dp, delta, rows, first_column, row_base, scores, N: tl.constexpr):
    """Gradient of a tile of scores, as a bias sees it; ``dp`` is d_out value^T, or transposed."""
    if scores.dropout is not None:
        keep = kept(scores.dropout, row_base, rows, first_column, N)
        dp = tl.where(keep, dp * scores.dropout.keep_scale, 0.0)
    return p * (dp - delta)
