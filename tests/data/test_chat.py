"""Chat templates: what three families of them write, and how they fail."""

import re
import sys

import pytest
from tokenizers import Tokenizer, models

from llmos_fast.data import PretrainedTokenizer
from llmos_fast.data.pretrained.chat_template import render_chat

pytest.importorskip("jinja2")

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Is <b> a tag & why? é "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Thanks"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "?"}
TEMPLATES = {
    "chatml": """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "llama2": """
{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {% set rest = messages[1:] %}
{% else %}
    {% set system = '' %}
    {% set rest = messages %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() }}
        {{- ' [/INST]' }}
    {% else %}
        {%- generation %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
""",
    "llama3": """{{ bos_token }}
{% for message in messages %}
  {% if message.content is none %}{% continue %}{% endif %}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}{{ message | tojson }}<|eot_id|>
{%- endfor %}
{% if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
Year {{ strftime_now('%Y') }}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}

""",
}


def make(template):
    vocabulary = {name: i for i, name in enumerate(["?", "<s>", "</s>", "<pad>", "a"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "?"])
    return PretrainedTokenizer(
        tokenizer, begin_id=1, end_ids=[2], pad_id=3, unknown_id=0, chat_template=template
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name, tmp_path, monkeypatch):
    # transformers looks for a package of this name, and would find this project's folder
    monkeypatch.setitem(sys.modules, "kernels", None)
    from transformers import AutoTokenizer

    tokenizer = make(TEMPLATES[name])
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    loaded = PretrainedTokenizer.load(tmp_path)
    for messages in (MESSAGES, MESSAGES[:1], MESSAGES[1:3]):
        for reply in (True, False):
            text = loaded.chat(messages, reply=reply)
            assert text == theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply
            )
            assert text == render_chat(TEMPLATES[name], messages, reply=reply, **TOKENS)


def test_chatml_word_for_word():
    assert make(TEMPLATES["chatml"]).chat(MESSAGES[2:]) == (
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("file", "file"),
        ([{"name": "default", "template": "d"}, {"name": "tools", "template": "t"}], "d"),
        ([{"name": "only", "template": "o"}], "o"),
    ],
    ids=["file", "named", "one"],
)
def test_where_templates_are_found(template, expected, tmp_path):
    import json

    make(None).save(tmp_path)
    if template == "file":
        (tmp_path / "chat_template.jinja").write_text("file")
    else:
        path = tmp_path / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {"chat_template": template}
        path.write_text(json.dumps(config))
    assert PretrainedTokenizer.load(tmp_path).chat(MESSAGES) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat_template"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for %}", "not valid Jinja"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception.__globals__.x }}", "unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "too big"),
        ("{{ messages[0].gone.gone }}", "no attribute 'gone'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_refuses_templates(template, message):
    with pytest.raises(ValueError, match=f"chat: .*{re.escape(message)}"):
        make(template).chat(MESSAGES)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["hi"], "message 0 must be a dict"),
        ([MESSAGES[0], {"content": "a"}], 'message 1 must be a dict with a "role"'),
        ([{"role": "user"}], 'message 0 must have a "content", got'),
    ],
)
def test_refuses_messages(messages, message):
    with pytest.raises(ValueError, match=message):
        make(TEMPLATES["chatml"]).chat(messages)


def test_other_variables():
    template = "{{ bos_token }}{{ tools }}{{ thinking is defined }}"
    assert make(template).chat([], tools="t", thinking=False) == "<s>tTrue"
    assert make(template).chat([]) == "<s>NoneFalse"


def test_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install \"llmos_fast\[chat\]\""):
        render_chat("a template no test compiled before", MESSAGES)
