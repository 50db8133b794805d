"""Engines that generate text, for bench_generate.py, all with the same weights.

They read a folder of Hugging Face's, or what is converted from it, once. ``read(prompts)`` begins
anew, ``step(tokens)`` goes on; both give the logits after the last token of each sequence. What is
not installed, or does not take the model, raises when it is made.

Every engine has torch's number of threads, and makes its own where all CPUs are allowed: libgomp
binds the thread that imports torch to the first one where OMP_PROC_BIND is set.

OpenVINO reads Llama's GGUF, and no GPT-2; its conversion from Hugging Face's models is optimum's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmos_fast.checkpoints import open_source
from llmos_fast.models import CausalLM, load

from .quant_peers import unbound

Run = Callable[[], Any]
Prompts = list[list[int]]


def cached(name: str, make: Callable[[Path], Any]) -> Path:
    """A path in a temporary folder that ``make`` has written, once for all runs."""
    folder = Path(tempfile.gettempdir()) / "llmos_fast_generate"
    path = folder / name
    if not path.exists():
        folder.mkdir(exist_ok=True)
        partial = folder / f"partial-{name}"
        shutil.rmtree(partial, ignore_errors=True)
        make(partial)
        partial.rename(path)
    return path


class Engine:
    """Greedy decoding by ``read`` and ``step``."""

    def read(self, prompts: Prompts) -> Tensor:
        raise NotImplementedError

    def step(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing, where nothing goes on by itself."""

    def reading(self, prompts: Prompts) -> Run:
        return lambda: self.read(prompts).argmax(-1)

    def writing(self, prompts: Prompts, steps: int) -> Run:
        """Reads the prompts at the first call; goes on by ``steps`` of each sequence at all."""
        tokens: Tensor | None = None

        def run() -> Tensor:
            nonlocal tokens
            if tokens is None:
                tokens = self.read(prompts).argmax(-1)
            for _ in range(steps):
                tokens = self.step(tokens).argmax(-1)
            return tokens

        return run


def forget() -> None:
    """Let all weights go but llama.cpp's, which stay mapped."""
    for load_it in (hugging_face_model, llama_model, ct2_generator, openvino_model):
        load_it.cache_clear()


# ---- Hugging Face ----


def transformers() -> Any:
    """The module, silent."""
    # it looks for a package of this name, and would find this project's folder
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    module = importlib.import_module("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@functools.cache
def hugging_face_model(source: Path) -> Any:
    read = transformers().AutoModelForCausalLM.from_pretrained
    return read(source, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


class HuggingFace(Engine):
    """transformers in bf16, with its DynamicCache."""

    def __init__(self, source: Path):
        self.model = hugging_face_model(source)

    def read(self, prompts: Prompts) -> Tensor:
        self.cache = transformers().DynamicCache()
        return self._call(torch.tensor(prompts))

    def step(self, tokens: Tensor) -> Tensor:
        return self._call(tokens[:, None])

    @torch.inference_mode()
    def _call(self, tokens: Tensor) -> Tensor:
        out = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]


# ---- llama.cpp ----


@functools.cache
def llama_cpp() -> Any:
    """The module, silent."""
    with unbound():
        module = importlib.import_module("llama_cpp.llama_cpp")
    module.silent = module.llama_log_callback(lambda level, text, data: None)
    module.llama_log_set(module.silent, None)
    module.llama_backend_init()
    return module


def gguf(source: Path, kind: str) -> Path:
    """bf16 written tensor by tensor, others by llama_model_quantize: all matrices of one type."""
    if kind == "bf16":
        return cached(f"{source.name}-bf16.gguf", functools.partial(_write_gguf, source))
    wide = gguf(source, "bf16")

    def make(path: Path) -> None:
        library = llama_cpp()
        options = library.llama_model_quantize_default_params()
        options.ftype = {"q4_0": 2, "q8_0": 7, "f16": 1}[kind]  # enum llama_ftype
        options.pure = options.allow_requantize = True
        names = str(wide).encode(), str(path).encode()
        status = library.llama_model_quantize(*names, ctypes.byref(options))
        if status != 0:
            raise ValueError(f"llama_model_quantize: {status}")

    return cached(f"{source.name}-{kind}.gguf", make)


def _write_gguf(source: Path, path: Path) -> None:
    format = importlib.import_module("gguf")
    model: CausalLM = load(source)  # type: ignore[assignment]
    c, family = model.config, model.hf_config["model_type"]
    writer = format.GGUFWriter(path, family)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(c.vocabulary)
    writer.add_context_length(c.max_length)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.inner)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    for add_epsilon in (writer.add_layer_norm_eps, writer.add_layer_norm_rms_eps):
        add_epsilon(1e-5)
    if family == "llama":
        writer.add_rope_dimension_count(c.head_dim)
    architecture = format.MODEL_ARCH[family.upper()]
    names = format.get_tensor_name_map(architecture, c.layers)
    for name, tensor in open_source(source).tensors.items():
        if ".c_" in name and tensor.ndim == 2:  # GPT-2 multiplies from the other side
            tensor = tensor.t()
        for projection, heads in (("q_proj", c.heads), ("k_proj", c.kv_heads)):
            if projection in name:  # rotary turns neighbours, not halves
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        theirs = names.get_name(name, (".weight", ".bias"))
        if tensor.ndim == 1 or "position" in theirs:
            writer.add_tensor(theirs, tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(theirs, raw, raw_dtype=format.GGMLQuantizationType.BF16)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()


@functools.cache
def llama_model(source: Path, kind: str) -> Any:
    library, path = llama_cpp(), str(gguf(source, kind)).encode()
    with unbound():
        model = library.llama_model_load_from_file(path, library.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp does not load {source.name} in {kind}")
    return model


class LlamaCpp(Engine):
    """llama_decode of batches; flash attention and the cache's fp16 are its defaults."""

    def __init__(self, source: Path, kind: str, batch: int, tokens: int):
        library, model = llama_cpp(), llama_model(source, kind)
        self.library = library
        settings = library.llama_context_default_params()
        settings.n_seq_max, settings.n_ctx = batch, tokens
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        with unbound():
            self.context = library.llama_init_from_model(model, settings)
        if not self.context:
            raise ValueError(f"llama.cpp makes no context for {tokens} tokens")
        self.vocabulary = load(source).config.vocabulary
        self.batch = library.llama_batch_init(tokens, 0, 1)

    def read(self, prompts: Prompts) -> Tensor:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)
        self.length = 0
        return self._decode(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        return self._decode(tokens[:, None].tolist())

    def _decode(self, rows: Prompts) -> Tensor:
        batch, i = self.batch, 0
        for sequence, row in enumerate(rows):
            for position, token in enumerate(row, self.length):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = False
                i += 1
            batch.logits[i - 1] = True
        batch.n_tokens = i
        self.length += len(rows[0])
        status = self.library.llama_decode(self.context, batch)
        assert status == 0, status
        logits = self.library.llama_get_logits(self.context)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (len(rows), self.vocabulary)))

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.library.llama_free(self.context)
            self.library.llama_batch_free(self.batch)


# ---- CTranslate2 ----


@functools.cache
def ct2_generator(source: Path) -> Any:
    ctranslate2 = importlib.import_module("ctranslate2")

    def make(folder: Path) -> None:
        from tokenizers import Tokenizer, models

        copy = folder.with_name("with-tokenizer")  # which the converter wants
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy, copy_function=lambda a, b: Path(b).symlink_to(a))
        words = {f"t{i}": i for i in range(load(source).config.vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
        fast = transformers().PreTrainedTokenizerFast
        ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t0")
        fast(tokenizer_object=tokenizer, **ends).save_pretrained(copy)
        converter = ctranslate2.converters.TransformersConverter(
            str(source), low_cpu_mem_usage=True
        )
        converter.convert(str(folder), quantization="int8")

    folder = cached(f"{source.name}-ct2", make)
    threads = torch.get_num_threads()
    with unbound():
        return ctranslate2.Generator(str(folder), compute_type="int8", intra_threads=threads)


class CTranslate2(Engine):
    """int8 by rows of the weights. It generates by itself, so its callback makes it wait."""

    def __init__(self, source: Path):
        self.generator = ct2_generator(source)
        self._pending: list[Any] = []
        self._closed, self._ahead = False, threading.Semaphore(0)

    def _generate(self, prompts: Prompts, length: int, **settings: Any) -> Any:
        return self.generator.generate_batch(
            [[f"t{token}" for token in prompt] for prompt in prompts],
            max_length=length,
            min_length=length,
            include_prompt_in_result=False,
            **settings,
        )

    def reading(self, prompts: Prompts) -> Run:
        def run() -> Tensor:
            return torch.tensor([r.sequences_ids[0][0] for r in self._generate(prompts, 1)])

        return run

    def writing(self, prompts: Prompts, steps: int) -> Run:
        done = threading.Semaphore(0)
        tokens = torch.zeros(len(prompts), dtype=torch.int64)
        seen = 0

        def callback(result: Any) -> bool:
            """For every sequence and step, the first of which is the prompt."""
            nonlocal seen
            tokens[result.batch_id] = result.token_id
            seen += 1
            if seen % len(prompts) == 0 and (seen // len(prompts) - 1) % steps == 0:
                done.release()
                self._ahead.acquire()
            return self._closed

        def run() -> Tensor:
            if not self._pending:
                room = 1024 - len(prompts[0])  # GPT-2's positions
                settings = {"asynchronous": True, "callback": callback}
                self._pending = self._generate(prompts, room, **settings)
                done.acquire()
            self._ahead.release()
            done.acquire()
            return tokens

        return run

    def close(self) -> None:
        """Let what generates end."""
        if self._pending:
            self._closed = True
            self._ahead.release()
            for result in self._pending:
                result.result()
            self._pending = []


# ---- OpenVINO ----


def openvino_ir(source: Path, kind: str) -> Path:
    """What openvino_genai makes of a GGUF and saves beside it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        model = folder / "model.gguf"
        model.symlink_to(gguf(source, kind))
        pipeline = importlib.import_module("openvino_genai").LLMPipeline
        with suppress(IndexError):  # once that is done, it wants a tokenizer
            pipeline(str(model), "CPU", enable_save_ov_model=True)
        if not (folder / "openvino_model.xml").exists():
            raise ValueError(f"openvino_genai does not read {source.name} in {kind}")

    return cached(f"{source.name}-{kind}-openvino", make)


@functools.cache
def openvino_model(source: Path, kind: str) -> Any:
    ov, op = importlib.import_module("openvino"), importlib.import_module("openvino.opset13")
    model = ov.Core().read_model(openvino_ir(source, kind) / "openvino_model.xml")
    # its pipeline projects the last token only, too
    project = model.output("logits").get_node().input_value(0).get_node()
    last = op.slice(project.input_value(0), [-1], [2**31 - 1], [1], [1])
    project.input(0).replace_source_output(last.output(0))
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    settings |= {"ENABLE_CPU_PINNING": True, "PERFORMANCE_HINT": "LATENCY"}
    with unbound():
        return ov.Core().compile_model(model, "CPU", settings)


class OpenVino(Engine):
    """Its defaults: activations in bf16 where the CPU has it, keys and values in 8 bits."""

    def __init__(self, source: Path, kind: str):
        self.request = openvino_model(source, kind).create_infer_request()

    def read(self, prompts: Prompts) -> Tensor:
        self.request.reset_state()
        self.length = 0
        return self._infer(torch.tensor(prompts))

    def step(self, tokens: Tensor) -> Tensor:
        return self._infer(tokens[:, None])

    def _infer(self, tokens: Tensor) -> Tensor:
        batch, count = tokens.shape
        positions = np.arange(self.length, self.length + count)
        self.length += count
        inputs = {
            "input_ids": tokens.numpy(),
            "attention_mask": np.ones((batch, self.length), np.int64),
            "position_ids": np.broadcast_to(positions, (batch, count)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        with unbound():  # it counts the CPUs at the first call
            self.request.infer(inputs, share_inputs=True)
        return torch.from_numpy(self.request.get_output_tensor(0).data)[:, -1]
