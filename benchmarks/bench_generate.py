"""Greedy text generation by whole models: reading prompts, decoding, and speculating.

Every engine has the same drawn weights and prompts. For decoding they take turns in blocks of 16
steps, from a prompt of 128 tokens on, until each has written 128 more; a time is that of one step.
``int8_cache`` is ours with keys and values in int8, otherwise they are of the activations' dtype.
Reading is given by token. The machine's limit is the weights that a step reads, or a prompt's
products. The memory of a whole process is memory_generate.py's.

    OMP_PROC_BIND=close OMP_PLACES=threads pytest benchmarks/ --benchmark-only -k generate
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmos_fast import use
from llmos_fast.generation import CachedDecoder, PromptLookup, speculate, stream
from llmos_fast.generation.speculative import Acceptance
from llmos_fast.models import CausalLM, build, load

from . import generate_peers as engines
from .generate_peers import Engine, Prompts, cached
from .quant_peers import reason

GPT2: dict[str, Any] = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SMALL = LLAMA | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SHAPES = {"small": SMALL, "gpt2-124m": GPT2, "llama-1.1b": LLAMA}
SCHEMES = {"int4-g128": ("int4", 128), "int4-g32": ("int4", 32), "int8": ("int8", 128)}
PROMPT = 128
STEPS, BLOCKS = 16, 8  # the first block of each engine is its warm-up
SMALLEST = "small"
BITS = {"int4-g128": 4, "int4-g32": 4, "int8": 8, "bf16": 16}
# of logits, relative to those of bf16: what rounding does to weights that were drawn
ROUNDING = {4: 0.9, 8: 0.3, 16: 0.05}


def checkpoint(shape: str) -> Path:
    """bf16, drawn as for training, with seed 0."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        build(SHAPES[shape]).bfloat16().save(folder)

    return cached(shape, make)


def vocabulary(shape: str) -> int:
    return SHAPES[shape].get("vocab_size", 50257)  # type: ignore[no-any-return]


class Ours(Engine):
    """Weights by ``scheme``, or bf16; keys and values int8, or the activations' dtype."""

    def __init__(self, model: CausalLM, tokens: int, cache_dtype: torch.dtype | None = None):
        self.decoder = CachedDecoder(model, cache_dtype)
        self.decoder.reserve(tokens)

    def read(self, prompts: Prompts) -> Tensor:
        self.decoder.keep([])
        return self.decoder.read(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        return self.decoder.step(tokens[:, None])[:, -1]


@functools.cache
def our_model(shape: str, scheme: str) -> CausalLM:
    return load(our_checkpoint(shape, scheme))  # type: ignore[return-value]


def our_checkpoint(shape: str, scheme: str) -> Path:
    if scheme == "bf16":
        return checkpoint(shape)

    def make(folder: Path) -> None:
        kind, group = SCHEMES[scheme]
        model = load(checkpoint(shape), scheme=kind, group_size=group, method="absmax")
        model.save(folder)

    return cached(f"{shape}-{scheme}", make)


def products(model: CausalLM) -> list[torch.nn.Module]:
    """What multiplies: in the blocks, and the projection to the vocabulary."""
    inside = [m for m in model.stack.modules() if "Linear" in type(m).__name__]
    return [*inside, model.head]


def streamed_bytes(model: CausalLM) -> int:
    """Of weights and biases that a step reads."""
    tensors = (t for m in products(model) for t in (*m.parameters(), *m.buffers()))
    return sum(tensor.nbytes for tensor in tensors)


def block_weights(shape: str) -> int:
    """How many numbers the blocks' products have."""
    model = our_model(shape, "bf16")
    return sum(m.weight.numel() for m in products(model)[:-1])  # type: ignore[union-attr,operator,misc]


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest, smoke: bool) -> Iterator[str]:
    """All of a model's cases run one after another, and its weights go before the next model's."""
    if smoke != (request.param == SMALLEST):
        pytest.skip("the small model is for smoke runs, and they are for it")
    yield request.param
    our_model.cache_clear()
    looping_model.cache_clear()
    engines.forget()


def prompts_of(shape: str, batch: int, length: int) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary(shape), (batch, length), generator=generator)
    return tokens.tolist()


def makers(shape: str, bits: int, batch: int, tokens: int) -> dict[str, Callable[[], Engine]]:
    """Engines that store weights in so many bits; ``tokens`` of all sequences at most."""
    source = checkpoint(shape)

    def llama(kind: str) -> Callable[[], Engine]:
        return lambda: engines.LlamaCpp(source, kind, batch, tokens)

    return {
        4: {"llama_q4_0": llama("q4_0"), "openvino_q4_0": lambda: engines.OpenVino(source, "q4_0")},
        8: {
            "llama_q8_0": llama("q8_0"),
            "openvino_q8_0": lambda: engines.OpenVino(source, "q8_0"),
            "ctranslate2_int8": lambda: engines.CTranslate2(source),
        },
        16: {
            "llama_bf16": llama("bf16"),
            "llama_f16": llama("f16"),
            "transformers_bf16": lambda: engines.HuggingFace(source),
        },
    }[bits]


@contextlib.contextmanager
def peers_of(
    shape: str, bits: int, batch: int, tokens: int
) -> Iterator[tuple[dict[str, Engine], dict[str, str]]]:
    """The engines that store weights in so many bits, and why others are left out."""
    found: dict[str, Engine] = {}
    left_out = {}
    if shape != SMALLEST:
        for name, make in makers(shape, bits, batch, tokens).items():
            try:
                found[name] = make()
            except Exception as error:
                left_out[name] = reason(error)
    try:
        yield found, left_out
    finally:
        for peer in found.values():
            peer.close()


@functools.cache
def check_ours(shape: str, scheme: str) -> None:
    """A prompt and a step: near plain torch's, which rounds the same numbers but for ties."""
    tokens = torch.tensor([5])
    (prompt,) = prompts_of(shape, 1, 16)
    model = our_model(shape, scheme)
    ours = Ours(model, 64)
    found = torch.cat((ours.read([prompt]), ours.step(tokens)))
    with use("reference"), torch.no_grad():
        expected = model(torch.tensor([[*prompt, 5]]))[0, -2:]
    error = (found - expected).norm() / expected.norm()
    assert error < 0.1, f"{shape} {scheme}: {error:.3f} from the reference"


def check_peers(shape: str, bits: int, peers: dict[str, Engine], prompts: Prompts) -> None:
    """The logits are those of the same model; one that only tells tokens must tell as many."""
    model = our_model(shape, "bf16")
    with torch.no_grad():
        expected = model.next_logits(torch.tensor(prompts)).float()
    for name, peer in peers.items():
        assert peer.reading(prompts)().shape == (len(prompts),)
        if type(peer).read is not Engine.read:
            found = peer.read(prompts).float()
            error = (found - expected).norm() / expected.norm()
            assert error < ROUNDING[bits], f"{name}: {error:.3f} from ours in bf16"


def tell_rates(benchmark: Any, tokens: int, left_out: dict[str, str]) -> None:
    """Tokens in a second of every engine, ``tokens`` to a measured time."""
    if not benchmark.enabled:
        return
    info = benchmark.extra_info
    times = {"ours": 1e3 * benchmark.stats.stats.median} | info.get("baselines_ms", {})
    times |= info["peers_ms"]
    info["tokens_per_s"] = {name: 1e3 * tokens / time for name, time in times.items()}
    info["left_out"] = left_out


@pytest.mark.filterwarnings("ignore")  # transformers deprecates what it documents
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("scheme", BITS)
def bench_generate_decode(
    benchmark: Any, compare: Any, smoke: bool, shape: str, scheme: str, batch: int
) -> None:
    if shape == "llama-1.1b" and batch > 1:
        pytest.skip("one sequence")
    prompts = prompts_of(shape, batch, PROMPT)
    bits, room = BITS[scheme], batch * (PROMPT + STEPS * BLOCKS + 1)
    model = our_model(shape, scheme)
    ours = {"ours": Ours(model, room), "int8_cache": Ours(model, room, torch.int8)}
    with peers_of(shape, bits, batch, room) as (peers, left_out):

        def check() -> None:
            check_ours(shape, scheme)
            check_peers(shape, bits, peers, prompts)

        runs = {name: engine.writing(prompts, STEPS) for name, engine in (ours | peers).items()}
        compare(
            runs["ours"],
            {name: runs[name] for name in peers},
            baselines={"int8_cache": runs["int8_cache"]},
            check=check,
            bytes=streamed_bytes(model),
            rounds=BLOCKS - 1,
            calls=dict.fromkeys(runs, STEPS),
        )
    tell_rates(benchmark, batch, left_out)
    benchmark.extra_info["streamed_bytes"] = streamed_bytes(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("length", [128, 1024])
@pytest.mark.parametrize("scheme", ["int4-g128", "int8", "bf16"])
def bench_generate_prefill(
    benchmark: Any, compare: Any, smoke: bool, shape: str, scheme: str, length: int
) -> None:
    prompts = prompts_of(shape, 1, length)
    bits = BITS[scheme]
    model = our_model(shape, scheme)
    with peers_of(shape, bits, 1, length) as (peers, left_out):

        def check() -> None:
            check_ours(shape, scheme)
            check_peers(shape, bits, peers, [prompts[0][:PROMPT]])

        all_engines = {"ours": Ours(model, length)} | peers
        runs = {name: engine.reading(prompts) for name, engine in all_engines.items()}
        compare(
            runs["ours"],
            {name: runs[name] for name in peers},
            check=check,
            # of the blocks, by their bits; a prompt's projection is of its last token alone
            flops=2 * block_weights(shape),
            dtype=torch.bfloat16 if bits == 16 else torch.int8,
            rounds=5 if length == 128 else 1,  # llama.cpp takes 9 s for Llama's 1024
            calls=dict.fromkeys(runs, length),
        )
    tell_rates(benchmark, 1, left_out)


PERIODS = (16, 64)


@functools.cache
def looping_model(shape: str) -> CausalLM:
    """One whose text goes round: the first 16 tokens follow each other, and so do the next 64.

    The blocks' weights are drawn as always; embeddings are large beside what blocks add, and the
    projection knows each by that of its successor.
    """

    def make(folder: Any) -> None:
        torch.manual_seed(0)
        model: Any = build(SHAPES[shape] | {"tie_word_embeddings": False})
        following = torch.arange(model.config.vocabulary)
        first = 0
        for period in PERIODS:
            loop = torch.arange(first, first + period)
            following[loop] = loop.roll(-1)
            first += period
        torch.nn.init.normal_(model.embedding.weight)
        model.head.weight.data[following] = 0.02 * model.embedding.weight.data
        with tempfile.TemporaryDirectory() as drawn:
            model.bfloat16().save(f"{drawn}/model")
            quantized = load(f"{drawn}/model", scheme="int4", group_size=128, method="absmax")
            quantized.save(folder)

    return load(cached(f"{shape}-loops", make))  # type: ignore[return-value]


@pytest.mark.parametrize("period", PERIODS)
def bench_generate_lookup(
    benchmark: Any, compare: Any, smoke: bool, shape: str, period: int
) -> None:
    """128 tokens of a text with this period; the first round has nothing to look up."""
    model, length = looping_model(shape), 128
    first = sum(shorter for shorter in PERIODS if shorter < period)
    prompt = list(range(first, first + 8))
    acceptance = Acceptance()

    def speculated() -> list[int]:
        nonlocal acceptance
        acceptance = Acceptance()
        return list(speculate(model, prompt, length, PromptLookup(), acceptance=acceptance))

    def plain() -> list[int]:
        return list(stream(model, prompt, length))

    text = plain()
    assert text[period:] == text[:-period], "the text does not go round"

    def check() -> None:
        assert speculated() == text

    check()  # for the count of passes
    compare(
        speculated,
        {},
        baselines={"plain": plain},
        check=check,
        bytes=streamed_bytes(model) * acceptance.passes / length,
        rounds=5,
        calls=dict.fromkeys(("ours", "plain"), length),
    )
    tell_rates(benchmark, 1, {})
    benchmark.extra_info["tokens_per_pass"] = acceptance.tokens / acceptance.passes
