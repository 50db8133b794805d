"""Models of transformers on llmos_fast's attention, against the same models on their own."""

import copy
import sys

import pytest
import torch
from torch import nn

from llmos_fast import ops, use
from llmos_fast.integrations import huggingface
from llmos_fast.testing import assert_close_to_truth, random

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
masking_utils = pytest.importorskip("transformers.masking_utils")
sdpa_attention = pytest.importorskip("transformers.integrations.sdpa_attention")

LAYERS, HEADS, HEAD_DIM, VOCABULARY, WINDOW = 2, 4, 8, 99, 5
BATCH, SEQ, PADDING = 2, 12, 4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    # weights that make attention choose: at the default of 0.02 it averages
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
NARROW = GROUPED | {"head_dim": HEAD_DIM, "sliding_window": WINDOW}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", SIZES | {"resid_pdrop": 0, "embd_pdrop": 0}),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES | NO_DROPOUT),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": HEADS * HEAD_DIM,
            "d_kv": HEAD_DIM,
            "d_ff": 48,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": None,
        },
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", NARROW),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        NARROW | {"query_pre_attn_scalar": HEAD_DIM, "attn_logit_softcapping": 2.0},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        # every token goes to every expert: a choice would make tiny differences large
        NARROW
        | {"num_local_experts": 2, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    ),
}
# transformers' sdpa has neither softcap nor sinks
PEER = {"gemma2": "eager", "gpt_oss": "eager"}


@pytest.fixture(autouse=True)
def registered():
    huggingface.register()


@pytest.fixture
def eager_in_float64(monkeypatch):
    """Masks that eager models in float64 can take: they round their scores to float32 for softmax.

    The least float64 would become -inf there, and a row without a key NaN.
    """
    monkeypatch.setitem(
        transformers.AttentionMaskInterface._global_mapping,
        "eager",
        lambda **call: masking_utils.eager_mask(**(call | {"dtype": torch.float32})),
    )


def make_model(name):
    model_class, config_class, options = MODELS[name]
    if not hasattr(transformers, model_class):
        pytest.skip(f"this version of transformers has no {model_class}")
    config = getattr(transformers, config_class)(**options)
    return getattr(transformers, model_class)(config).eval()


def make_inputs(name, padding="none", seq=SEQ):
    """Keyword arguments of a forward, and where its logits mean something."""
    tokens = torch.randint(3, VOCABULARY, (BATCH, seq))
    mask = torch.ones_like(tokens)
    if padding != "none":
        mask[0, -PADDING:] = 0
    if padding == "left":
        mask = mask.flip(1)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": tokens}
    if name == "t5":
        inputs["labels"] = torch.randint(3, VOCABULARY, (BATCH, seq - 3))
        return inputs, torch.ones_like(inputs["labels"]).bool()
    # the first token after left padding would be predicted from a row that sees nothing
    seen = mask.bool() & mask.roll(1, dims=1).bool()
    inputs["labels"] = tokens.masked_fill(~seen, -100)
    return inputs, mask.bool()


def compare(ours, eager, truth, reduction, name="out"):
    """The error budget, after a look at whether eager and truth mean the same."""
    half_of_the_digits = torch.finfo(eager.dtype).eps ** 0.5
    assert (eager - truth).abs().max() < half_of_the_digits * truth.abs().max(), name
    assert_close_to_truth(ours, eager, truth, reduction=reduction, name=name)


def run(model, implementation, inputs, where):
    """Logits and the gradients of the loss, by name of the parameter."""
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    model.zero_grad()
    result = model(**inputs)
    result.loss.backward()
    return result.logits[where].detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("eager_in_float64")
def test_logits_and_gradients(name, padding):
    model = make_model(name)
    inputs, where = make_inputs(name, padding)
    ours = run(model, "llmos_fast", inputs, where)
    eager = run(model, PEER.get(name, "sdpa"), inputs, where)
    truth = run(copy.deepcopy(model).double(), "eager", inputs, where)
    # each layer's attention chains two sums; the gradient of a weight runs over all tokens
    reduction = LAYERS * HEAD_DIM * SEQ
    compare(ours[0], eager[0], truth[0], reduction, "logits")
    assert ours[1].keys() == truth[1].keys()
    for parameter, true in truth[1].items():
        # softmax does not see what is added to all of a row's scores: nothing to compare with
        if not parameter.endswith("key.bias"):
            gradients = ours[1][parameter], eager[1][parameter]
            compare(*gradients, true, reduction * BATCH * SEQ, parameter)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "bert"])
def test_greedy_generation(name, cache):
    model = make_model(name)
    inputs, _ = make_inputs(name, "left")
    del inputs["labels"]
    options = {
        "max_new_tokens": 2 * WINDOW,
        "do_sample": False,
        "no_repeat_ngram_size": 1,  # or a random model would say one word for ever
        "cache_implementation": cache,
    }
    model.set_attn_implementation(PEER.get(name, "sdpa"))
    expected = model.generate(**inputs, **options)
    model.set_attn_implementation("llmos_fast")
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert len(expected.unique()) > WINDOW


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prefill_in_chunks(name):
    model = make_model(name)
    model.set_attn_implementation("llmos_fast")
    tokens = make_inputs(name)[0]["input_ids"]
    options = {"max_new_tokens": WINDOW, "do_sample": False}
    whole = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=WINDOW, **options), whole)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_compiles_in_one_graph(name):
    model = make_model(name)
    inputs, where = make_inputs(name, "left")
    eager = run(model, "llmos_fast", inputs, where)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    result = compiled(**inputs)
    result.loss.backward()
    assert torch.equal(result.logits[where], eager[0])
    assert all(torch.equal(p.grad, eager[1][n]) for n, p in model.named_parameters())


def test_loads_with_the_name(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, attn_implementation="llmos_fast", local_files_only=True
    )
    assert model.config._attn_implementation == "llmos_fast"


@pytest.fixture
def calls(monkeypatch):
    """Arguments of each call of ops.attention."""
    recorded = []

    def attention(query, key, value, **options):
        recorded.append(options | {"query": query, "key": key})
        return original(query, key, value, **options)

    original = ops.attention
    monkeypatch.setattr(ops, "attention", attention)
    return recorded


def test_plain_calls_have_no_mask_and_no_repeated_keys(calls):
    for name, causal in (("llama", "top_left"), ("bert", False)):
        model = make_model(name)
        model.set_attn_implementation("llmos_fast")
        calls.clear()
        model(make_inputs(name)[0]["input_ids"])
        assert len(calls) == LAYERS
        assert all(call["mask"] is None for call in calls)
        assert all(call["causal"] == causal for call in calls)
        assert all(call["key"].shape[1] == (2 if name == "llama" else HEADS) for call in calls)


def test_packed_sequences_of_a_model():
    model = make_model("llama")
    model.set_attn_implementation("llmos_fast")
    tokens, lengths = torch.randint(3, VOCABULARY, (1, 9)), [4, 5]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": 5,
        "max_length_k": 5,
    }
    logits = model(tokens, position_ids=positions, **packed).logits
    separate = torch.cat([model(part).logits for part in tokens.split(lengths, dim=1)], dim=1)
    truth = copy.deepcopy(model).double()
    truth.set_attn_implementation("eager")
    true = torch.cat([truth(part).logits for part in tokens.split(lengths, dim=1)], dim=1)
    reduction = LAYERS * HEAD_DIM * max(lengths)
    compare(logits, separate, true, reduction)


class Layer(nn.Module):
    """What the functions read of a model's attention layer."""

    num_key_value_groups = 2

    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


def make_tensors(seq_q=6, seq_k=6, dtype=torch.float32):
    query = random(BATCH, HEADS, seq_q, HEAD_DIM, seed=1, dtype=dtype)
    key = random(BATCH, HEADS // 2, seq_k, HEAD_DIM, seed=2, dtype=dtype)
    value = random(BATCH, HEADS // 2, seq_k, HEAD_DIM, seed=3, dtype=dtype)
    return query, key, value


def compare_with_sdpa(layer, tensors, mask, **options):
    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    theirs = sdpa_attention.sdpa_attention_forward
    ours, weights = huggingface.attention_forward(layer, *tensors, mask, **options)
    eager, _ = theirs(layer, *tensors, mask, **options)
    exact = {name: double(value) for name, value in options.items()}
    truth, _ = theirs(layer, *map(double, tensors), double(mask), **exact)
    assert weights is None
    assert ours.is_contiguous()
    reduction = HEAD_DIM * tensors[1].shape[2]
    compare(ours, eager, truth, reduction)


@pytest.mark.parametrize("seq_q", [1, 6, 9], ids=["decode", "static_cache", "square"])
@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("of_layer", [True, False])
def test_causality_is_that_of_sdpa(seq_q, is_causal, of_layer):
    tensors = make_tensors(seq_q, 9)
    bias = random(1, HEADS, seq_q, 9, seed=4)
    compare_with_sdpa(Layer(of_layer), tensors, None, is_causal=is_causal, scaling=0.3)
    compare_with_sdpa(Layer(of_layer), tensors, None, is_causal=is_causal, position_bias=bias)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_are_those_of_sdpa(kind, with_bias):
    mask = torch.rand(BATCH, 1, 6, 9) > 0.3
    mask[..., 0] = True
    if kind == "float":
        mask = random(BATCH, 1, 6, 9, seed=5).masked_fill(~mask, torch.finfo(torch.float32).min)
    bias = random(BATCH, HEADS, 6, 9, seed=4) if with_bias else None
    compare_with_sdpa(Layer(), make_tensors(6, 9), mask, position_bias=bias)


def test_a_mask_says_everything(calls):
    mask = torch.ones(BATCH, 1, 6, 6, dtype=torch.bool)
    lengths = torch.tensor([0, 12], dtype=torch.int32)
    huggingface.attention_forward(
        Layer(),
        *make_tensors(),
        mask,
        sliding_window=2,
        cu_seq_lens_q=lengths,
        cu_seq_lens_k=lengths,
        max_length_q=12,
        max_length_k=12,
    )
    assert calls[0]["mask"] is mask
    assert (calls[0]["causal"], calls[0]["window"], calls[0]["cu_seqlens"]) == (False, None, None)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_rows_without_a_key_are_zero(impl):
    mask = torch.ones(BATCH, 1, 6, 6, dtype=torch.bool)
    mask[0, :, 2] = False
    with use(impl):
        out, _ = huggingface.attention_forward(Layer(), *make_tensors(), mask)
    assert out.is_contiguous()
    assert not out[0, 2].any()
    assert out[1].all()


@pytest.mark.parametrize(("seq_q", "is_causal"), [(1, True), (6, True), (6, False)])
def test_window_without_a_mask(seq_q, is_causal):
    tensors = make_tensors(seq_q, 6)
    distance = torch.arange(6) - torch.arange(6)[:, None]
    near = distance.abs() < 3
    mask = (near & (distance <= 0) if is_causal else near)[-seq_q:]
    layer = Layer(is_causal)
    ours, _ = huggingface.attention_forward(layer, *tensors, None, sliding_window=3)
    # a single query takes another kernel with a window than with a mask
    masked, _ = huggingface.attention_forward(layer, *tensors, mask)
    truth, _ = huggingface.attention_forward(layer, *(t.double() for t in tensors), mask)
    assert_close_to_truth(ours, masked, truth, reduction=6 * tensors[0].shape[-1])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_packed_sequences_see_only_themselves(as_tensor):
    query, key, value = (t[:1] for t in make_tensors(9, 9))
    lengths, longest = torch.tensor([0, 4, 9], dtype=torch.int32), 5
    longest = torch.tensor(longest) if as_tensor else longest
    ours, _ = huggingface.attention_forward(
        Layer(),
        query,
        key,
        value,
        None,
        sliding_window=3,
        cu_seq_lens_q=lengths,
        cu_seq_lens_k=lengths,
        max_length_q=longest,
        max_length_k=longest,
    )
    parts = zip(*(t.split([4, 5], dim=2) for t in (query, key, value)), strict=True)
    separate = [
        huggingface.attention_forward(Layer(), *part, None, sliding_window=3)[0] for part in parts
    ]
    assert torch.equal(ours, torch.cat(separate, dim=1))


def test_dropout_reaches_the_op():
    query, key, value = make_tensors()
    torch.manual_seed(1)
    ours, _ = huggingface.attention_forward(Layer(), query, key, value, None, dropout=0.5)
    torch.manual_seed(1)
    expected = ops.attention(query, key, value, causal=True, dropout_p=0.5)
    assert torch.equal(ours, expected.transpose(1, 2))


def test_sinks_by_query_are_refused():
    sinks = random(BATCH, HEADS, 6, 1)
    with pytest.raises(ValueError, match="llmos_fast: sinks must be None"):
        huggingface.attention_forward(Layer(), *make_tensors(), None, sinks=sinks)


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install"):
        huggingface.register()
