"""Chat templates: the Jinja programs that write messages the way a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

Messages = Sequence[Mapping[str, Any]]


def render_chat(template: str, messages: Messages, *, reply: bool = True, **variables: Any) -> str:
    """``messages`` as ``template`` writes them, as transformers' ``apply_chat_template`` does.

    template:  Jinja; it comes with a model, so it runs in a sandbox.
    messages:  of each at least its "role" and "content".
    reply:     end with what opens the model's answer.
    variables: what else the template reads: ``bos_token``, ``eos_token``, ``tools``, ...

    Raises ValueError where the messages are malformed or the template fails or refuses them, and
    ImportError where ``jinja2`` is missing.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'chat: message {i} must be a dict with a "role" of type str')
        if "content" not in message:
            raise ValueError(f'chat: message {i} must have a "content", got {sorted(message)}')
    program = _compile(template)
    given = {
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": reply,
        "tools": None,
        "documents": None,
    }
    try:
        return str(program.render(given | variables))
    except Exception as error:  # a template is a program: it may fail in any way
        raise ValueError(f"chat: the template failed: {error or type(error).__name__}") from error


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError('chat: templates need jinja2: pip install "llmos_fast[chat]"') from error

    class Generation(Extension):
        """``{% generation %}`` marks what a model learns to say: here only its content counts."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except (TemplateError, RecursionError) as error:
        raise ValueError(f"chat: the template is not valid Jinja: {error}") from error
