"""The command line: what works, and the one line that says what does not."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from llmos_fast.cli import main
from llmos_fast.commands import quickstart
from llmos_fast.data import load_tokenizer
from llmos_fast.models import build
from llmos_fast.training import ModelSettings, Trainer, read_log, resume

COMMANDS = ["quickstart", "train", "evaluate", "generate", "chat", "quantize", "info"]
STORIES = Path("/work/shared/data/models/stories260k")
BERT = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
BERT |= {"num_attention_heads": 1, "max_position_embeddings": 16}
SMALL = (
    *("--emsize", "8", "--nhid", "8", "--nlayers", "1", "--epochs", "2"),
    *("--batch-size", "4", "--bptt", "5", "--device", "cpu"),
)


@pytest.fixture
def run(capsys):
    """Run a command line: (exit status, standard output, standard error)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return (stop.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the red cat saw the green dog\nthe dog ran and the cat ran\n" * 20)
    return path


@pytest.fixture
def trained(run, text, tmp_path):
    """A finished run."""
    status, _, error = run("train", text, "--output", tmp_path / "run", *SMALL)
    assert (status, error) == (0, "")
    return tmp_path / "run"


@pytest.fixture
def stories():
    """A trained model of llama2.c, or a loud skip."""
    path = STORIES / "stories260K.bin"
    if not path.is_file():
        pytest.skip(f"NOT CHECKED: {path} is missing")
    return path


@pytest.fixture
def saved_talker(talker, tmp_path):
    """The folder of a pretrained model with a chat template."""
    model, tokenizer = talker
    model.save(tmp_path / "talker", tokenizer)
    return tmp_path / "talker"


def assert_one_line(result, message, status=1):
    assert result[0] == status
    assert message in result[2]
    assert result[2].count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "Usage:" in out


def test_help_lists_every_command(run):
    _, out, _ = run("--help")
    assert all(command in out for command in COMMANDS)


def test_train_evaluate_generate(run, trained):
    assert len(read_log(trained / "log.csv")) == 2
    status, out, _ = run("evaluate", trained, "--split", "test", "--batch-size", 1)
    assert status == 0
    assert "perplexity" in out
    generate = ("generate", trained, "--prompt", "The cat", "--length", 8, "--seed", 3)
    status, out, _ = run(*generate)
    assert status == 0
    assert out.startswith("the cat")
    assert "<unk>" not in out
    assert run(*generate)[1] == out


def test_plain_output_where_there_is_no_terminal(run, text, tmp_path):
    _, out, _ = run("train", text, "--output", tmp_path / "run", *SMALL, "--log-every", 5)
    assert "\x1b" not in out
    assert "step 5/" in out
    assert "tokens/s" in out
    assert "left" in out


@pytest.mark.parametrize("tokenizer", ["whitespace", "bpe"])
def test_tokenizers(run, text, tmp_path, tokenizer):
    options = ("--tokenizer", tokenizer, "--vocabulary-size", 300, *SMALL)
    assert run("train", text, "--output", tmp_path / "run", *options)[0] == 0
    assert run("generate", tmp_path / "run", "--prompt", "the cat")[1].startswith("the cat")


def test_resume_is_exact(run, text, tmp_path):
    options = (*SMALL, "--log-every", 1)
    run("train", text, "--output", tmp_path / "whole", *options)
    run("train", text, "--output", tmp_path / "parts", *options, "--max-steps", 5)
    status, out, _ = run(
        "train", "--resume", tmp_path / "parts", "--max-steps", 0, "--log-every", 1
    )
    assert status == 0
    assert "after step 5" in out

    def losses(name):
        return {r.step: r.loss for r in read_log(tmp_path / name / "log.csv")}

    assert losses("parts") == losses("whole")
    weights = [(tmp_path / n / "checkpoint/model.safetensors") for n in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_quantize(run, trained):
    status, out, _ = run("quantize", trained, "--scheme", "int4", "--group-size", 32)
    assert status == 0
    assert "MB" in out
    assert "validation perplexity" in out
    quantized = trained / "checkpoint-int4"
    config = json.loads((quantized / "config.json").read_text())
    record = {"scheme": "int4", "group_size": 32, "layers": {}, "embeddings": False, "skip": []}
    assert config["quantization"] == record
    assert run("evaluate", quantized, "--batch-size", 2)[0] == 0
    assert run("generate", quantized, "--prompt", "the cat")[0] == 0
    assert_one_line(run("quantize", quantized), "is quantized already, to int4")
    assert_one_line(run("quantize", trained, "--scheme", "int3"), "got 'int3'")
    assert_one_line(run("quantize", trained, "--method", "best"), "method must be one of")


def test_quantize_embeddings(run, trained, tmp_path):
    for options in ((), ("--embeddings",)):
        folder = tmp_path / f"quantized{len(options)}"
        assert run("quantize", trained, *options, "--output", folder)[0] == 0
        assert run("generate", folder, "--prompt", "the cat")[0] == 0
        assert run("evaluate", folder, "--batch-size", 2)[0] == 0
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization"]["embeddings"] == bool(options)


def test_quantize_with_calibration(run, trained, tmp_path):
    """The decoder of so small a model has most of the weights; what else there is gets 8 bits."""
    options = ("--scheme", "int4_a16", "--group-size", 32, "--method", "gptq")
    assert run("quantize", trained, *options, "--output", tmp_path / "gptq")[0] == 0
    assert run("quantize", trained, *options, "--bits", 40, "--output", tmp_path / "wide")[0] == 0
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config["quantization"]["layers"]["decoder"] == "int8_a16"
    assert run("evaluate", tmp_path / "wide", "--batch-size", 2)[0] == 0
    assert run("evaluate", tmp_path / "gptq", "--batch-size", 2)[0] == 0
    assert_one_line(run("quantize", trained, *options, "--bits", 1), "bits must be at least")


def test_generate_tells_the_published_story(run, stories):
    """As run.c of llama2.c does, which stops at the token that begins the next story."""
    story = (STORIES / "stories260K.md").read_text().split("```")[3].split("\n", 2)[2].strip()
    command = ("generate", stories, "--temperature", 0, "--length", 256)
    assert run(*command) == (0, story + "\n", "")
    assert run(*command, "--draft", "prompt")[1] == story + "\n"
    assert run(*command, "--draft", stories)[1] == story + "\n"
    before = story[: story.index("big, red")]
    assert run(*command, "--stop", "never", "--stop", "big, red")[1] == before + "\n"


@pytest.mark.parametrize(
    "options",
    [
        ("--scheme", "int8"),
        ("--scheme", "int4", "--group-size", 32),
        ("--int8-cache",),
        ("--beams", 3),
        ("--beams", 2, "--length-penalty", -1),
        ("--draft", "prompt", "--int8-cache"),
        ("--repetition-penalty", 1.2, "--min-p", 0.1),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_generate_in_every_way(run, stories, options):
    command = ("generate", stories, "--prompt", "Once upon a time", "--length", 16, "--seed", 3)
    status, out, error = run(*command, *options)
    assert (status, error) == (0, "")
    assert out.startswith("Once upon a time,")
    assert run(*command, *options)[1] == out


def test_several_texts(run, stories):
    command = ("generate", stories, "--prompt", "The", "--length", 12, "--sequences", 3)
    status, out, _ = run(*command)
    assert status == 0
    texts = out.splitlines()
    assert len(texts) == len(set(texts)) == 3
    assert all(text.startswith("The") for text in texts)


def test_text_is_printed_as_it_is(run, saved_talker):
    """Neither markup nor emoji are what rich would make of them."""
    text = "[bold]:smile:[/bold]  x"
    status, out, _ = run("generate", saved_talker, "--prompt", text, "--length", 0)
    assert (status, out) == (0, text + "\n")


@pytest.mark.parametrize("options", [(), ("--scheme", "int8"), ("--int8-cache", "--system", "Hm")])
def test_chat(run, saved_talker, monkeypatch, options):
    command = ("chat", saved_talker, "--temperature", 0, "--length", 9, *options)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nSo what?\n"))
    status, out, error = run(*command)
    assert (status, error) == (0, "")
    answers = out.splitlines()
    assert len(answers) == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nnever read\n"))
    assert run(*command)[:2] == (0, answers[0] + "\n")


def test_chat_beyond_the_context(run, saved_talker, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi " * 100 + "\n"))
    assert_one_line(run("chat", saved_talker), "fit the model's context of 256 tokens")


def test_quantize_and_evaluate_a_pretrained_model(run, saved_talker, text, tmp_path):
    options = (text, "--batch-size", 1, "--bptt", 16)
    status, out, error = run("evaluate", saved_talker, "--text", *options)
    assert (status, error) == (0, "")
    assert "perplexity" in out
    assert run("evaluate", saved_talker, "--scheme", "int8", "--text", *options)[0] == 0
    folder = tmp_path / "quantized"
    quantize = ("quantize", saved_talker, "--scheme", "int4", "--group-size", 32)
    status, out, error = run(*quantize, "--output", folder)
    assert (status, error) == (0, "")
    assert "MB" in out
    assert run("evaluate", folder, "--text", *options)[0] == 0
    read = run("generate", saved_talker, "--scheme", "int4", "--prompt", "Hi", "--temperature", 0)
    kept = run("generate", folder, "--prompt", "Hi", "--temperature", 0)
    assert read[0] == kept[0] == 0
    assert run(*quantize)[0] == 0
    assert (tmp_path / "talker-int4" / "tokenizer.json").is_file()
    assert_one_line(run("quantize", folder), "scheme must be None for a quantized checkpoint")
    assert_one_line(run(*quantize, "--method", "gptq"), "--method gptq and --bits read the text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--draft", "nothing/at/all"), "no such checkpoint folder"),
        (("--draft", "other"), "--draft must name a decoder-only model of one vocabulary"),
        (("--draft", "prompt", "--repetition-penalty", 2), "repetition_penalty must be 1, got 2"),
        (("--draft", "prompt", "--beams", 2), "--beams, --draft and --sequences exclude"),
        (("--sequences", 2, "--beams", 2), "--beams, --draft and --sequences exclude"),
        (("--sequences", 2, "--draft", "prompt"), "--beams, --draft and --sequences exclude"),
        (("--scheme", "int3"), "scheme must be one of"),
        (("--length", 5000), "fit the model's context of 256 tokens"),
        (("--min-p", 2), "min_p must be in 0..1, got 2"),
        (("--stop", ""), "texts must not be empty"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_generate_refuses(run, saved_talker, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    if "other" in options:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        other = build({"model_type": "llama", "vocab_size": 9, "num_hidden_layers": 1} | sizes)
        other.save(tmp_path / "other", load_tokenizer(saved_talker))
    assert_one_line(run("generate", saved_talker, *options), message)


def test_what_our_own_checkpoints_do_not_do(run, trained):
    for command in ("generate", "evaluate"):
        assert_one_line(run(command, trained, "--scheme", "int8"), "--scheme is for pretrained")
    assert_one_line(run("generate", trained, "--draft", "prompt"), "needs a decoder-only model")
    assert_one_line(run("chat", trained), "has no chat template")


def test_chat_without_a_template(run, saved_talker):
    path = saved_talker / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    assert_one_line(run("chat", saved_talker), "has no chat template; use llmos-fast generate")


def test_what_writes_no_text(run, tmp_path):
    build({"model_type": "bert", **BERT}).save(tmp_path / "bert")
    for command in ("generate", "evaluate", "chat"):
        assert_one_line(run(command, tmp_path / "bert"), "which writes no text")


def test_info(run, monkeypatch):
    module = ModuleType("llmos_fast.info")
    module.report = lambda: "attention: reference"
    monkeypatch.setitem(sys.modules, "llmos_fast.info", module)
    assert run("info")[:2] == (0, "attention: reference\n")


def test_quickstart(run, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "_MODEL", ModelSettings(8, 2, 8, 1, 0.1))
    monkeypatch.setattr(quickstart, "_MIN_COUNT", 1000)
    monkeypatch.setattr(quickstart, "_TIMED_STEPS", 2)
    options = ("--steps", 2, "--output", tmp_path / "run")
    status, out, error = run("quickstart", *options)
    assert (status, error) == (0, "")
    for expected in ("validation perplexity", "int8", "int4", "the game was", "torch.nn", "Done"):
        assert expected in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least 2 lines, got 0"),
        ("one line only\n", "at least 2 lines, got 1"),
        ("--\n--\n", "at least one word"),
        ("a b\nc d\n", "at least 2 for each of 4 rows, got 3"),
    ],
    ids=["empty", "one line", "no words", "too short"],
)
def test_too_little_text(run, tmp_path, content, message):
    (tmp_path / "text.txt").write_text(content)
    result = run("train", tmp_path / "text.txt", "--output", tmp_path / "run", *SMALL)
    assert_one_line(result, message)


def test_missing_text(run, tmp_path):
    result = run("train", tmp_path / "nothing.txt", "--output", tmp_path / "run")
    assert_one_line(result, "no such text file, folder or data set")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lr", -1), "learning_rate must be above 0"),
        (("--optimizer", "lion"), "optimizer must be one of"),
        (("--tokenizer", "letters"), "kind must be one of"),
        (("--nhead", 3), "ninp must be a multiple of nhead"),
        (("--device", "abacus"), "--device must be cpu, cuda or cuda:N, got 'abacus'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_wrong_settings(run, text, tmp_path, options, message):
    result = run("train", text, "--output", tmp_path / "run", *SMALL, *options)
    assert_one_line(result, message)


def test_wrong_command_line(run):
    assert run("train", "--nonsense")[0] == 2


def test_a_run_is_not_overwritten(run, text, trained):
    assert_one_line(run("train", text, "--output", trained, *SMALL), "holds a run already")


def test_resume_keeps_the_settings(run, trained):
    result = run("train", "--resume", trained, "--lr", 0.1)
    assert_one_line(result, "lr cannot be combined with --resume")


@pytest.mark.parametrize("command", ["evaluate", "generate", "chat", "quantize"])
def test_missing_checkpoint(run, tmp_path, command):
    assert_one_line(run(command, tmp_path / "nothing"), "no such checkpoint folder")


def test_missing_checkpoint_to_resume(run, tmp_path):
    assert_one_line(run("train", "--resume", tmp_path), "no such checkpoint folder")


@pytest.mark.parametrize("command", ["evaluate", "generate", "quantize"])
def test_damaged_checkpoint(run, trained, command):
    weights = trained / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert_one_line(run(command, trained), "not a whole safetensors file")


def test_unknown_word_policy(run, trained):
    generate = ("generate", trained, "--prompt", "the zebra", "--length", 0)
    assert run(*generate)[1] == "the <unk>\n"
    assert_one_line(run(*generate, "--unknown", "raise"), "'zebra' is not one of the")


def test_evaluate_refuses_other_splits(run, trained):
    assert_one_line(run("evaluate", trained, "--split", "dev"), "split must be one of")


def test_disk_full(run, text, tmp_path, monkeypatch):
    """The second checkpoint fails: the first stays, and the message says how to go on."""
    write, calls = resume.write_json, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(resume, "write_json", full)
    options = (*SMALL, "--checkpoint-every", 3)
    result = run("train", text, "--output", tmp_path / "run", *options)
    assert_one_line(result, "No space left on device")
    assert f"llmos-fast train --resume {tmp_path / 'run'}" in result[1]
    assert json.loads((tmp_path / "run/checkpoint/training.json").read_text())["steps_done"] == 3
    assert run("train", "--resume", tmp_path / "run")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_interrupted(run, text, tmp_path, monkeypatch, number):
    """A signal in the middle of step 4: the step is finished and saved."""
    whole_step = Trainer._step

    def step(self, data, targets):
        if self.steps_done == 3:
            os.kill(os.getpid(), number)
        return whole_step(self, data, targets)

    monkeypatch.setattr(Trainer, "_step", step)
    before = signal.getsignal(number)
    status, out, error = run("train", text, "--output", tmp_path / "run", *SMALL)
    assert (status, error) == (130, "")
    assert "Interrupted after step 4." in out
    assert f"llmos-fast train --resume {tmp_path / 'run'}" in out
    assert json.loads((tmp_path / "run/checkpoint/training.json").read_text())["steps_done"] == 4
    assert signal.getsignal(number) == before


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal's process has it: one in the background ignores it from its start."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_twice_keeps_the_last_good_checkpoint(run, text, tmp_path, monkeypatch):
    whole_step = Trainer._step

    def step(self, data, targets):
        if self.steps_done == 4:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)  # two that wait for Python's next look count as one
            signal.raise_signal(signal.SIGINT)
        return whole_step(self, data, targets)

    monkeypatch.setattr(Trainer, "_step", step)
    options = (*SMALL, "--checkpoint-every", 3)
    status, out, _ = run("train", text, "--output", tmp_path / "run", *options)
    assert status == 130
    assert "--resume" in out
    assert json.loads((tmp_path / "run/checkpoint/training.json").read_text())["steps_done"] == 3


def test_runs_as_a_process(tmp_path):
    """The exit status and the one line reach the shell."""
    code = "from llmos_fast.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "generate", str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("llmos-fast: no such checkpoint folder")
