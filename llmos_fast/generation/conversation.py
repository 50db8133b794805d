"""A dialogue that goes on from what the model has read already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmos_fast.data import PretrainedTokenizer
from llmos_fast.generation.decoder import CachedDecoder
from llmos_fast.generation.generate import Generation, stream_text
from llmos_fast.generation.sampling import GREEDY, Sampling


class Conversation:
    """Questions and answers in the form of a chat template; only what is new is computed.

    decoder:  with nothing read yet, or the conversation's own
    sampling: of the answers
    seed:     of the first answer; the next has the next one
    stop:     strings that end an answer
    system:   what the model is told first

    Attributes:
        messages: what was said, as templates take it.
    """

    def __init__(
        self,
        decoder: CachedDecoder,
        tokenizer: PretrainedTokenizer,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Sequence[str] = (),
        system: str | None = None,
    ):
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._decoder, self._tokenizer = decoder, tokenizer
        self._sampling, self._seed, self._stop = sampling, seed, stop

    def ask(self, question: str, length: int) -> Iterator[str]:
        """The answer, of up to ``length`` tokens, piece by piece.

        It belongs to the conversation once it was taken to its end. Raises ValueError where the
        template refuses the question or the context is full; the conversation is then as before.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = self._tokenizer.encode(self._tokenizer.chat(messages), special=False)
        limit = self._decoder.max_length
        room = length if limit is None else min(length, limit - len(prompt) + 1)
        generation = Generation(
            self._decoder,
            [prompt],
            max(room, 1),
            sampling=self._sampling,
            seed=self._seed,
            stop_ids=self._tokenizer.end_ids,
        )
        tokens = (step[0] for step in generation if step[0] not in self._tokenizer.end_ids)
        pieces = []
        for piece in stream_text(tokens, self._tokenizer, self._stop):
            pieces.append(piece)
            yield piece
        self._seed += 1
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
