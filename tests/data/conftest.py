"""A small tokenizer, and the settings that stand beside one."""

import json

import pytest
from tokenizers import Tokenizer, models


@pytest.fixture
def words():
    vocabulary = {w: i for i, w in enumerate(["?", "<s>", "</s>", "<end>", "<pad>", "hi", "yo"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<end>", "<pad>"])
    return tokenizer


@pytest.fixture
def write():
    """write(folder, name=content, ...): JSON files."""

    def call(folder, **files):
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")

    return call
