"""Tokenizers of models that exist, from the files they come in."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from llmos_fast.data.pretrained.chat_template import Messages, render_chat
from llmos_fast.data.pretrained.files import find, read
from llmos_fast.data.pretrained.text_stream import TextStream, TokenBytes

_LARGEST_ID = 1 << 24


class PretrainedTokenizer:
    """Text to the ids that a published model expects, and back.

    tokenizer:     a ``tokenizers.Tokenizer``. It is taken over: it no longer truncates or pads.
    begin_id:      id before a text; None where the model has none.
    end_ids:       ids of which each ends a text, the model's own first.
    pad_id:        id that fills up a batch, or None.
    unknown_id:    id of what has no token, or None.
    adds_begin:    ``encode`` begins with ``begin_id`` though the tokenizer itself does not add it.
    chat_template: Jinja source for ``chat``, or None.

    Special tokens are found in a text by their names, as in ``transformers``: a text of strangers
    can hold them.

    Raises ValueError for ids without a token and for a decoder that is not supported.
    """

    kind = "pretrained"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        begin_id: int | None = None,
        end_ids: Collection[int] = (),
        pad_id: int | None = None,
        unknown_id: int | None = None,
        adds_begin: bool = False,
        chat_template: str | None = None,
    ):
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        self._length = max(ids, default=-1) + 1
        if not 0 < self._length <= _LARGEST_ID or len(set(ids)) != len(ids):
            raise ValueError(
                f"PretrainedTokenizer: ids must be distinct and in 0..{_LARGEST_ID - 1}, got "
                f"{len(ids)} tokens and {len(set(ids))} ids up to {self._length - 1}"
            )
        named = {"begin_id": begin_id, "pad_id": pad_id, "unknown_id": unknown_id}
        for name, index in (*named.items(), *(("end_ids", i) for i in end_ids)):
            if index is not None and not (
                0 <= index < self._length and tokenizer.id_to_token(index)
            ):
                raise ValueError(
                    f"PretrainedTokenizer: {name} must be in 0..{self._length - 1}, got {index}"
                )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.begin_id = begin_id
        self.end_ids = tuple(end_ids)
        self.pad_id = pad_id
        self.unknown_id = unknown_id
        self.chat_template = chat_template
        self._tokenizer = tokenizer
        if adds_begin:
            self._add_begin()
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._bytes = TokenBytes(tokenizer, self._length)

    @property
    def end_id(self) -> int | None:
        """The first of ``end_ids``; None where there is none."""
        return self.end_ids[0] if self.end_ids else None

    def __len__(self) -> int:
        """One more than the largest id."""
        return self._length

    def encode(self, text: str, unknown: str = "map", *, special: bool = True) -> list[int]:
        """Ids of ``text``.

        unknown: "map" gives what has no token ``unknown_id``; "raise" raises ValueError for it.
        special: add what the model expects around a text, such as ``begin_id``.
        """
        if unknown not in ("map", "raise"):
            raise ValueError(f"encode: unknown must be 'map' or 'raise', got {unknown!r}")
        try:
            ids = list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        except TypeError as error:  # the package says so of half a surrogate pair too
            raise ValueError(f"encode: text must be a whole str, got {text!r:.60}") from error
        if unknown == "raise" and self.unknown_id in ids:
            raise ValueError(f"encode: {text[:40]!r} has a part that none of {len(self)} tokens is")
        return ids

    def encode_pair(
        self, first: str, second: str, *, special: bool = True
    ) -> tuple[list[int], list[int]]:
        """Ids of two texts as one, and of each id its segment: for BERT 0 or 1."""
        both = self._tokenizer.encode(first, second, add_special_tokens=special)
        return list(both.ids), list(both.type_ids)

    def encode_line(self, line: str) -> list[int]:
        """Ids of one line of a corpus and of the line break after it."""
        return self.encode(line + "\n", special=False)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD.

        special: write special tokens by their names instead of leaving them out.

        Raises ValueError for an id without a token.
        """
        stream = self.stream(special=special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, *, special: bool = False) -> TextStream:
        """Decoder of ids that come one by one: ``push`` each, ``flush`` at the end."""
        return TextStream(self._bytes, () if special else self._special)

    def chat(self, messages: Messages, *, reply: bool = True, **variables: Any) -> str:
        """``messages`` as the model was trained to read them.

        messages:  dicts of "role" and "content".
        reply:     end with what opens the model's answer.
        variables: what else the template reads, such as ``tools``.

        The text usually holds the tokens around it: ``encode(text, special=False)``.

        Raises ValueError without a template, and where it refuses the messages; ImportError
        without ``jinja2``.
        """
        if self.chat_template is None:
            raise ValueError("chat: the tokenizer has no chat_template: its files came without one")
        return render_chat(self.chat_template, messages, reply=reply, **self._names() | variables)

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json, which ``transformers`` reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._names(),
            "eos_token_id": list(self.end_ids),
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str(), encoding="utf-8")
        text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> PretrainedTokenizer:
        """The tokenizer in a folder or a file, and what the settings beside it say of it.

        Of a folder it takes the first of: tokenizer.json; vocab.json and merges.txt (GPT-2);
        vocab.txt (BERT); spiece.model or tok*.model (sentencepiece); tok*.bin (llama2.c).
        Special ids come from tokenizer_config.json, special_tokens_map.json,
        generation_config.json and config.json, the chat template from tokenizer_config.json or
        chat_template.jinja.

        Raises ValueError that names a file which is missing or not what it should be.
        """
        file = find(Path(path))
        arguments = read(file)
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def _names(self) -> dict[str, str]:
        """Special tokens by the names that transformers and templates have for them."""
        ids = (self.begin_id, self.end_id, self.pad_id, self.unknown_id)
        named = zip(("bos", "eos", "pad", "unk"), ids, strict=True)
        return {
            f"{name}_token": str(self._tokenizer.id_to_token(i))
            for name, i in named
            if i is not None
        }

    def _add_begin(self) -> None:
        if self.begin_id is None:
            raise ValueError("PretrainedTokenizer: adds_begin needs a begin_id, got None")
        tokenizer = self._tokenizer
        if tokenizer.encode("").ids[:1] == [self.begin_id]:
            return
        token = tokenizer.id_to_token(self.begin_id)
        begin = processors.TemplateProcessing(
            single=[token, "$A"],
            pair=[token, "$A", "$B:1"],
            special_tokens=[(token, self.begin_id)],
        )
        before = tokenizer.post_processor
        tokenizer.post_processor = processors.Sequence([before, begin]) if before else begin
