"""Every family with its options computes what transformers does on the same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

from llmos_fast.models import build, load
from llmos_fast.testing import assert_close_to_truth

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 97, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_heads": 4}
T5 |= {"num_decoder_layers": 3, "decoder_start_token_id": 0}


def rope(kind, limit=64, **options):
    parameters = {"rope_type": kind, "rope_theta": 500.0, **options}
    return GROUPED | {"rope_parameters": parameters, "max_position_embeddings": limit}


STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = STRETCHED | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 7, "num_hidden_layers": 3}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
CAUSAL = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2 inner": ("GPT2LMHeadModel", GPT2 | {"n_inner": 70}),
    "gpt2 gelu": ("GPT2LMHeadModel", GPT2 | {"activation_function": "gelu"}),
    "gpt2 relu": ("GPT2LMHeadModel", GPT2 | {"activation_function": "relu"}),
    "gpt2 free head": ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False}),
    "llama": ("LlamaForCausalLM", SIZES),
    "llama grouped": ("LlamaForCausalLM", GROUPED),
    "llama one kv head": ("LlamaForCausalLM", SIZES | {"num_key_value_heads": 1}),
    "llama biases": ("LlamaForCausalLM", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}),
    "llama head_dim": ("LlamaForCausalLM", GROUPED | {"head_dim": 20}),
    "llama gelu": ("LlamaForCausalLM", GROUPED | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama theta": ("LlamaForCausalLM", rope("default")),
    "llama linear": ("LlamaForCausalLM", rope("linear", factor=3.0)),
    "llama dynamic below": ("LlamaForCausalLM", rope("dynamic", 64, factor=4.0)),
    "llama dynamic above": ("LlamaForCausalLM", rope("dynamic", 16, factor=4.0)),
    "llama llama3": ("LlamaForCausalLM", rope("llama3", **LLAMA3)),
    "llama yarn": ("LlamaForCausalLM", rope("yarn", **STRETCHED)),
    "llama yarn betas": (
        "LlamaForCausalLM",
        rope("yarn", **STRETCHED, beta_fast=8.0, beta_slow=2.0, truncate=False),
    ),
    "llama yarn attention": ("LlamaForCausalLM", rope("yarn", **STRETCHED, attention_factor=1.3)),
    "llama yarn mscale": (
        "LlamaForCausalLM",
        rope("yarn", **STRETCHED, mscale=1.0, mscale_all_dim=0.7),
    ),
    "mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": 8}),
    "mistral without a window": ("MistralForCausalLM", GROUPED | {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen2 sliding": ("Qwen2ForCausalLM", GROUPED | SLIDING | {"max_window_layers": 1}),
    "qwen2 layer types": ("Qwen2ForCausalLM", GROUPED | SLIDING | {"layer_types": KINDS}),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 24}),
    "qwen3 biases": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 24, "attention_bias": True}),
}
BERT = SIZES | {"type_vocab_size": 3, "num_labels": 5}
HEADS = {
    "BertModel": ("last_hidden_state", "pooler_output"),
    "BertForMaskedLM": ("logits",),
    "BertForPreTraining": ("prediction_logits", "seq_relationship_logits"),
    "BertForSequenceClassification": ("logits",),
    "BertForTokenClassification": ("logits",),
}
MASKS = {
    "none": lambda mask: mask,
    "right": lambda mask: mask.index_fill(1, torch.arange(12, 20), 0),
    "left": lambda mask: mask.index_fill(1, torch.arange(5), 0),
    "holes": lambda mask: (torch.rand(mask.shape) < 0.6).long(),
    "one row alone": lambda mask: mask.index_fill(0, torch.tensor([0, 2]), 0),
}


def theirs(architecture, options):
    """A tiny model of transformers with random biases and norms, too."""
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def both(tmp_path):
    """both(architecture, options): transformers' model, and ours of the folder it saved."""

    def make(architecture, options):
        model = theirs(architecture, options)
        model.save_pretrained(tmp_path)
        return model, load(tmp_path)

    return make


def assert_same(ours, model, read, reduction=97):
    """``ours`` is within the error budget of ``read(model)``, whose truth is in fp64."""
    with torch.no_grad():
        eager, truth = read(model), read(copy.deepcopy(model).double())
    assert_close_to_truth(ours, eager, truth, reduction=reduction)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models(name, both):
    model, ours = both(*CAUSAL[name])
    tokens = torch.randint(0, 97, (2, 33))
    with torch.no_grad():
        logits = ours(tokens)
        last = ours.next_logits(tokens)
    assert_same(logits, model, lambda m: m(tokens).logits)
    assert_same(last, model, lambda m: m(tokens).logits[:, -1])


@pytest.mark.parametrize("name", CAUSAL)
def test_reading_prompts_and_stepping_equals_the_whole_pass(name, both):
    model, ours = both(*CAUSAL[name])
    tokens = torch.randint(0, 97, (2, 33))
    cache = ours.new_cache()
    lengths = [20, 7]
    ours.read([row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)], cache)
    for step in range(13):
        cache.extend([1, 1])
        newest = torch.stack([tokens[b, n + step] for b, n in enumerate(lengths)])[:, None]
        with torch.no_grad():
            logits = ours.step(newest, cache.positions(newest.shape[1]), cache)[:, 0]
        # dynamic scaling turns what was kept before by other angles than the whole pass would
        if name != "llama dynamic above":
            for row, n in enumerate(lengths):
                whole = tokens[row : row + 1, : n + step + 1]
                assert_same(logits[row], model, lambda m, w=whole: m(w).logits[0, -1])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("architecture", HEADS)
def test_bert(architecture, mask, both):
    model, ours = both(architecture, BERT)
    tokens, types = torch.randint(0, 97, (3, 20)), torch.randint(0, 3, (3, 20))
    mask = MASKS[mask](torch.ones(3, 20, dtype=torch.long))
    with torch.no_grad():
        hidden = ours(tokens, mask, types)
        outputs = {
            "last_hidden_state": lambda: hidden,
            "pooler_output": lambda: ours.pool(hidden),
            "prediction_logits": lambda: ours.mlm_logits(hidden),
            "seq_relationship_logits": lambda: ours.next_sentence_logits(hidden),
            "logits": lambda: (ours.mlm_logits if "mlm" in ours.heads else ours.classify)(hidden),
        }
        for name in HEADS[architecture]:
            result = outputs[name]()
            # what is read of padding means nothing
            kept = (mask if result.ndim == 3 else mask[:, 0]).bool()

            def read(m, name=name, kept=kept):
                return m(tokens, attention_mask=mask, token_type_ids=types)[name][kept]

            assert_same(result[kept], model, read)
    assert not hidden[mask == 0].any()


def test_bert_without_mask_and_types(both):
    model, ours = both("BertModel", BERT)
    tokens = torch.randint(0, 97, (3, 20))
    with torch.no_grad():
        assert_same(ours(tokens), model, lambda m: m(tokens).last_hidden_state)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("projection", ["relu", "gated-gelu", "gated-silu"])
def test_t5(projection, tied, both):
    options = T5 | {"feed_forward_proj": projection, "tie_word_embeddings": tied}
    model, ours = both("T5ForConditionalGeneration", options)
    tokens, target = torch.randint(0, 97, (3, 150)), torch.randint(0, 97, (3, 24))
    labels = torch.randint(0, 97, (3, 24)).index_fill(1, torch.tensor([5]), -100)
    mask = torch.ones(3, 150, dtype=torch.long)
    mask[0, 20:], mask[1, 90:] = 0, 0

    def read(m):
        return m(tokens, attention_mask=mask, decoder_input_ids=target).logits

    with torch.no_grad():
        assert_same(ours(tokens, target, mask), model, read)
        memory, cache = ours.encode(tokens, mask), ours.new_cache(3)
        parts = [target[:, :10], *target[:, 10:].split(1, dim=1)]
        assert_same(torch.cat([ours.step(t, memory, cache) for t in parts], 1), model, read)
        loss = ours.loss(tokens, target, labels, mask)

    def their_loss(m):
        given = {"attention_mask": mask, "decoder_input_ids": target, "labels": labels}
        return m(tokens, **given).loss

    assert_same(loss, model, their_loss)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
        ("llama tied", {}),
        ("llama biases", {}),
    ],
)
def test_gradients_of_the_loss(name, options, both):
    architecture, sizes = CAUSAL[name]
    model, ours = both(architecture, sizes | options)
    tokens = torch.randint(0, 97, (2, 21))
    ours.train().loss(tokens[:, :-1], tokens[:, 1:]).backward()
    results = []
    for m in (model, copy.deepcopy(model).double()):
        logits = m(tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        results.append({n: p.grad for n, p in m.named_parameters()})
    eager, truth = results
    for name, parameter in ours.named_parameters():
        sources = [ours.family.prefixed(source) for source in ours.family.sources(name)]
        low, true = (torch.cat([of[source] for source in sources]) for of in (eager, truth))
        gradient = parameter.grad.t() if ours.family.is_transposed(name) else parameter.grad
        assert_close_to_truth(gradient, low, true, reduction=97 * 40, name=name)


@pytest.mark.parametrize("name", ["gpt2", "llama grouped", "qwen3"])
def test_training_lowers_the_loss(name):
    torch.manual_seed(0)
    architecture, options = CAUSAL[name]
    config = getattr(transformers, architecture).config_class(**options).to_dict()
    model = build(config)
    tokens = torch.randint(0, 97, (4, 17))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(10):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
