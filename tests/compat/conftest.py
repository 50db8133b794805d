"""Attention as flash-attn's docstrings describe it, in plain PyTorch, and the dtypes."""

import math

import pytest
import torch


def _plain_attention(
    q, k, v, *, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    softmax_scale=None, starts=None, lengths=None,
):  # fmt: skip
    """(out, lse) for (batch, seq, heads, dim), computed in q's dtype as the formulas stand.

    Keys are those of starts[b] <= j < lengths[b]; distances count from the last of them.
    """
    batch, seq_q, heads, dim = q.shape
    seq_k = k.shape[1]
    k, v = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (k, v))
    lengths = torch.full((batch,), seq_k) if lengths is None else lengths
    starts = torch.zeros(batch) if starts is None else starts
    j = torch.arange(seq_k).expand(batch, 1, seq_q, seq_k)
    position = torch.arange(seq_q).view(1, 1, seq_q, 1) + (lengths - seq_q).view(-1, 1, 1, 1)
    hidden = (j >= lengths.view(-1, 1, 1, 1)) | (j < starts.view(-1, 1, 1, 1))
    if causal:
        hidden = hidden | (j > position)
    if window_size[0] >= 0:
        hidden = hidden | (j < position - window_size[0])
    if window_size[1] >= 0:
        hidden = hidden | (j > position + window_size[1])
    scale = 1 / math.sqrt(dim) if softmax_scale is None else softmax_scale
    k, v = (t.masked_fill(hidden.all(2).transpose(1, 2)[..., None], 0.0) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype).expand(batch, heads)
        scores = scores - slopes[:, :, None, None] * (position - j).abs()
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    empty = hidden.all(-1, keepdim=True)
    probabilities = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("bhij,bjhd->bihd", probabilities, v), lse


@pytest.fixture(scope="session")
def plain_attention():
    return _plain_attention


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param
