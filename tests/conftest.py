"""Seeds, poisoned allocations and the fixtures that every test folder shares."""

import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # processes that wait for one another's threads take several times as long
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

if not torch.cuda.is_available():
    # read when triton is imported: the GPU kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

from triton.runtime import interpreter


def patch_once_per_launch():
    """Make interpreted kernels 10 times as fast: triton patches itself at every inner call."""
    patch, run = interpreter._patch_lang, interpreter.InterpretedFunction.run
    patched = set()

    def run_afresh(self, *args, **kwargs):
        patched.clear()
        return run(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if self.fn not in patched:
            patched.add(self.fn)
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.run = run_afresh
    interpreter.InterpretedFunction.__call__ = call


def index_by_arrays_of_one():
    """Triton 3.6's interpreter takes them for integers, which numpy does no longer from 2.4 on."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def round_as_a_gpu():
    """Triton's interpreter cuts bf16 off, slowly, and loses carries and NaN of e4m3."""
    convert = interpreter._convert_float

    def rounded(values, source, target, rounding_mode):
        if (source.name, target.name) == ("fp32", "bf16"):
            floats = np.ascontiguousarray(values).view(np.float32)
            bits = torch.from_numpy(floats).bfloat16().view(torch.int16).numpy()
            return bits.view(np.uint16).reshape(values.shape)
        if (source.name, target.name) == ("fp32", "fp8e4nv"):
            floats = np.ascontiguousarray(values).view(np.float32)
            bits = torch.from_numpy(floats).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
            return bits.reshape(values.shape)
        if (source.name, target.name) == ("fp8e4nv", "fp32"):
            codes = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8))
            floats = codes.view(torch.float8_e4m3fn).float().numpy()
            return floats.view(np.uint32).reshape(values.shape)
        if (source.name, target.name) == ("bf16", "fp32"):
            return values.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = rounded


patch_once_per_launch()
index_by_arrays_of_one()
round_as_a_gpu()

# a change is judged by its own examples, not by the day's luck
settings.register_profile("ci", derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser):
    help_text = "note down what launches compile to, instead of comparing with golden.json"
    parser.addoption("--write-golden", action="store_true", help=help_text)


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Fill every uninitialised tensor with NaN: a kernel that skips an element is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def talker():
    """(model, tokenizer): a tiny random model of ASCII letters, with a chat template."""
    from llmos_fast.data import PretrainedTokenizer
    from llmos_fast.models import build

    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    letter_tokens = Tokenizer(models.BPE(vocabulary, []))
    letter_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letter_tokens.decoder = decoders.ByteLevel()
    letter_tokens.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    start, end = len(letters), len(letters) + 1
    tokenizer = PretrainedTokenizer(
        letter_tokens, begin_id=start, end_ids=[end], chat_template=CHATML
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 256}
    model = build({"model_type": "llama", "vocab_size": len(tokenizer)} | sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
        model.head.weight[start] = 0.0  # nobody begins a message in the middle of one
    return model, tokenizer
