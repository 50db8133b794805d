"""Models with a memory of what they have read: a prompt is computed once, then token by token.

CachedDecoder     keys and values in pages, steps captured: CausalLM
Seq2SeqDecoder    the prompt is the encoder's: EncoderDecoder
WindowDecoder     computes the last tokens again at each step: any LanguageModel
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmos_fast.models import CausalLM, EncoderDecoder, LanguageModel
from llmos_fast.models.block import Memory
from llmos_fast.recording import Captured

# tokens per sequence up to which a step is captured: drafts are verified this way, too
_CAPTURED_TOKENS = 16


class Decoder(Protocol):
    """A batch of sequences in the making.

    max_length: tokens that the model can tell apart; None where nothing limits them
    """

    max_length: int | None

    def read(self, prompts: list[list[int]]) -> Tensor:
        """Begin a sequence for each prompt; logits of the token after it: Float[batch ntoken]."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Go on with ``tokens: Int[batch seq]``; logits after each: Float[batch seq ntoken].

        They may be overwritten by the next call.
        """
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Sequence b becomes what sequence rows[b] was."""
        ...


def decoder_of(
    model: LanguageModel | EncoderDecoder,
    *,
    context: int | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Decoder:
    """The decoder for a model, which is put in evaluation mode.

    context:     tokens that a model without a cache looks back; None is all
    cache_dtype: of a CausalLM's keys and values: None (the model's) or int8
    """
    model.eval()
    if isinstance(model, CausalLM):
        return CachedDecoder(model, cache_dtype)
    if cache_dtype is not None:
        kind = type(model).__name__
        raise ValueError(f"generate: cache_dtype must be None for a {kind}, got {cache_dtype}")
    if isinstance(model, EncoderDecoder):
        return Seq2SeqDecoder(model)
    return WindowDecoder(model, context)


class CachedDecoder:
    """A CausalLM and its ``PagedCache``.

    On a CPU the native calls of a step are recorded (``llmos_fast.capture``) for every shape of
    tokens, again when the cache moves.

    Attributes:
        tokens: what was read, of each sequence.
        uncaptured: why steps are not recorded; None where they are.
    """

    def __init__(self, model: CausalLM, cache_dtype: torch.dtype | None = None):
        self.model, self.max_length = model, model.config.max_length
        self.cache = model.new_cache(cache_dtype)
        self.tokens: list[list[int]] = []
        self.uncaptured: str | None = None
        if self.cache.device.type != "cpu":
            self.uncaptured = "capture records CPU kernels only"
        self._steps: dict[tuple[int, ...], tuple[int, Captured]] = {}

    def reserve(self, tokens: int) -> None:
        """Expect so many tokens of all sequences together, instead of growing to them."""
        self.cache.reserve(tokens)

    def read(self, prompts: list[list[int]]) -> Tensor:
        """See ``Decoder``.

        A single prompt goes on from what it has in common with the single sequence that is there.
        """
        if self.tokens:
            if len(prompts) != 1 or len(self.tokens) != 1:
                raise ValueError(
                    f"CachedDecoder: prompts must be one to go on from one sequence, got "
                    f"{len(prompts)} and {len(self.tokens)}"
                )
            return self._resume(prompts[0])
        self.tokens = [list(prompt) for prompt in prompts]
        return self.model.read(prompts, self.cache)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """See ``Decoder``."""
        for sequence, new in zip(self.tokens, tokens.tolist(), strict=True):
            sequence += new
        self.cache.extend([tokens.shape[1]] * tokens.shape[0])
        positions = self.cache.positions(tokens.shape[1])
        if self.uncaptured is not None or tokens.shape[1] > _CAPTURED_TOKENS:
            return self.model.step(tokens, positions, self.cache)
        return self._replay(tokens, positions)

    def keep(self, rows: Sequence[int]) -> None:
        """See ``Decoder``; sequences share pages until they part."""
        self.tokens = [list(self.tokens[row]) for row in rows]
        self.cache.reorder(rows)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget the tokens of sequence b from ``lengths[b]`` on."""
        for sequence, length in zip(self.tokens, lengths, strict=True):
            del sequence[length:]
        self.cache.truncate(lengths)

    def _resume(self, prompt: list[int]) -> Tensor:
        (known,) = self.tokens
        most = min(len(known), len(prompt) - 1)
        same = next((i for i in range(most) if known[i] != prompt[i]), most)
        self.rewind([same])
        device = self.cache.device
        return self.step(torch.tensor([prompt[same:]], device=device))[:, -1]

    def _replay(self, tokens: Tensor, positions: Tensor) -> Tensor:
        shape = tuple(positions.shape)
        moves, captured = self._steps.get(shape, (-1, None))
        if captured is not None and moves == self.cache.moves:
            logits: Tensor = captured(tokens, positions)
            return logits
        # recordings of where the cache was before would keep that memory
        self._steps = {k: v for k, v in self._steps.items() if v[0] == self.cache.moves}
        try:
            captured = Captured(lambda t, p: self.model.step(t, p, self.cache), tokens, positions)
        except ValueError as error:
            self.uncaptured = str(error)
            return self.model.step(tokens, positions, self.cache)
        self._steps[shape] = (self.cache.moves, captured)
        return captured.outputs  # type: ignore[no-any-return]


class Seq2SeqDecoder:
    """An EncoderDecoder, whose prompts are sources and whose sequences begin with a start token."""

    def __init__(self, model: EncoderDecoder):
        self.model = model
        self.max_length: int | None = None
        self._memory: Memory | None = None

    @torch.no_grad()
    def read(self, prompts: list[list[int]]) -> Tensor:
        """See ``Decoder``."""
        device = self.model.embedding_device
        longest = max(map(len, prompts))
        tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        mask = torch.arange(longest, device=device) < lengths[:, None]
        self._memory = self.model.encode(tokens, mask)
        self._cache = self.model.new_cache(len(prompts))
        start = torch.full((len(prompts), 1), self.model.start_id, device=device)
        return self.step(start)[:, -1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """See ``Decoder``."""
        assert self._memory is not None
        return self.model.step(tokens, self._memory, self._cache)

    def keep(self, rows: Sequence[int]) -> None:
        """See ``Decoder``."""
        assert self._memory is not None
        index = torch.tensor(rows, device=self.model.embedding_device)
        self._cache.reorder(index)
        self._memory = self._memory.rows(index)


class WindowDecoder:
    """A LanguageModel without a cache, which sees at most ``context`` tokens."""

    def __init__(self, model: LanguageModel, context: int | None = None):
        if context is not None and context < 1:
            raise ValueError(f"generate: context must be at least 1, got {context}")
        self.model, self.context = model, context
        self.max_length: int | None = None
        self._tokens: list[list[int]] = []

    @torch.no_grad()
    def read(self, prompts: list[list[int]]) -> Tensor:
        """See ``Decoder``."""
        self._tokens = [list(prompt) for prompt in prompts]
        return self._logits()

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """See ``Decoder``."""
        columns = []
        for column in tokens.T.tolist():
            for sequence, token in zip(self._tokens, column, strict=True):
                sequence.append(token)
            columns.append(self._logits())
        return torch.stack(columns, dim=1)

    def keep(self, rows: Sequence[int]) -> None:
        """See ``Decoder``."""
        self._tokens = [list(self._tokens[row]) for row in rows]

    def _logits(self) -> Tensor:
        """Rows of one length together: the model takes no padding."""
        device = next(self.model.parameters()).device
        windows = [t if self.context is None else t[-self.context :] for t in self._tokens]
        logits: list[Tensor | None] = [None] * len(windows)
        for length in {len(window) for window in windows}:
            rows = [i for i, window in enumerate(windows) if len(window) == length]
            found = self.model.next_logits(torch.tensor([windows[i] for i in rows], device=device))
            for i, row in zip(rows, found, strict=True):
                logits[i] = row
        return torch.stack(logits)  # type: ignore[arg-type]
