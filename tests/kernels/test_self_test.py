"""When launches are tested, what is remembered of it, and which are used then."""

import json
import threading
from pathlib import Path

import pytest
import torch
import triton
from llmos_fast.kernels import launch, ptxas, self_test, verdicts
from llmos_fast.kernels.launch import Launch, Pinned, Variant
from torch._subclasses.fake_tensor import FakeTensorMode

from llmos_fast.testing import random

CPU = torch.device("cpu")
FORWARD, KEY, _ = self_test.KERNELS
TILES = Launch(32, 32, 4, 1, TMA=True)


def variant(kernel=FORWARD, tiles=TILES, dtype=torch.bfloat16, hides=False):
    return Variant(kernel, tiles, 64, dtype, hides)


def arguments(x):
    return launch.Arguments(
        x, x, x, *(None,) * 5, 0, 0, None, None, "", -1, -1, 0.0, 0.0, None, 1.0
    )


def test_a_pinned_launch_is_nobody_elses():
    call = arguments(random(1, 1, 4, 8))
    pinned = Pinned(*call)
    pinned.launches = {FORWARD: Launch(16, 16, 4, 1)}
    assert launch.choose(FORWARD, pinned, ()) == Launch(16, 16, 4, 1)
    assert launch.choose(FORWARD, call, ()) == TILES


# when it runs, and what is remembered


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """CPU tensors count as Hopper's, and ``wrong`` launches fail; the list of what was tested."""

    def new_process():
        self_test._settled.clear()
        self_test._admitted.clear()
        self_test._named.clear()
        launch.struck_off.clear()
        verdicts.environment.cache_clear()

    class Asked(list):
        wrong = ()

        def __call__(self, variant, device):
            self.append(variant)
            return variant.launch not in self.wrong

    asked = Asked()
    asked.new_process = new_process
    asked.folder = tmp_path / "llmos_fast"
    monkeypatch.setattr(self_test, "applies", lambda device, dtype: dtype.itemsize == 2)
    monkeypatch.setattr(self_test, "passes", asked)
    monkeypatch.setattr(ptxas, "version", lambda: "12.8.93")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    new_process()
    yield asked
    new_process()


def test_a_launch_is_tested_once_in_a_process_and_once_on_a_machine(hopper):
    for _ in range(2):
        assert launch.usable(variant(), CPU)
    assert hopper == [variant()]
    hopper.new_process()
    assert launch.usable(variant(), CPU)
    assert hopper == [variant()]
    others = [
        variant(KEY),
        variant(dtype=torch.float16),
        variant(hides=True),
        variant()._replace(head_dim=128),
        variant(tiles=Launch(64, 32, 4, 1)),
    ]
    for other in others:
        assert launch.usable(other, CPU)
    assert hopper == [variant(), *others]
    (file,) = hopper.folder.iterdir()
    assert len(json.loads(file.read_text())["verdicts"]) == 6


def test_a_wrong_launch_is_struck_off_and_the_warning_says_what_to_do(hopper):
    hopper.wrong = (TILES,)
    for _ in range(2):
        with pytest.warns(UserWarning, match="is wrong on") as caught:
            assert not launch.usable(variant(), CPU)
        assert not launch.usable(variant(), CPU)
        assert len(caught) == 1
        text = str(caught[0].message)
        for part in ("attention_forward(BLOCK_M=32", "bfloat16", "H100", "12.8.93"):
            assert part in text
        for part in ('pip install "llmos-fast[ptxas]"', "TRITON_PTXAS_PATH"):
            assert part in text
        # known to the next process without a test
        hopper.new_process()
    assert hopper == [variant()]


def test_one_warning_names_everything_that_is_known_to_be_wrong(hopper):
    hopper.wrong = (TILES,)
    for kernel in (FORWARD, KEY):
        with pytest.warns(UserWarning, match=f"not used: {kernel}"):
            launch.usable(variant(kernel), CPU)
    hopper.new_process()
    with pytest.warns(UserWarning, match="attention_forward.*attention_backward_key") as caught:
        answers = [launch.usable(variant(kernel), CPU) for kernel in (FORWARD, KEY)]
    assert answers == [False, False]
    assert len(caught) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"{}",
        b'{"environment": {}, "verdicts": {}}',
        b'{"environment": 1}',
        b"[" * 100_000,
    ],
    ids=["empty", "binary", "list", "object", "foreign", "number", "deep"],
)
def test_a_file_that_is_not_ours_is_ignored_and_rewritten(hopper, content):
    launch.usable(variant(), CPU)
    (file,) = hopper.folder.iterdir()
    right = file.read_bytes()
    file.write_bytes(content)
    hopper.new_process()
    assert launch.usable(variant(), CPU)
    assert len(hopper) == 2
    assert [f.read_bytes() for f in hopper.folder.iterdir()] == [right]


def test_a_verdict_of_another_environment_does_not_count(hopper):
    launch.usable(variant(), CPU)
    (file,) = hopper.folder.iterdir()
    content = json.loads(file.read_text())
    foreign = {
        "environment": content["environment"] | {"ptxas": "12.9.86"},
        "verdicts": {self_test.name(variant()): False},
    }
    file.write_text(json.dumps(foreign))
    hopper.new_process()
    assert launch.usable(variant(), CPU)
    assert len(hopper) == 2
    assert json.loads(file.read_text()) == content


@pytest.mark.parametrize("written", [[], {"name": 1}, {"name": "false"}, {"name": None}], ids=str)
def test_verdicts_are_true_or_false(hopper, written):
    launch.usable(variant(), CPU)
    (file,) = hopper.folder.iterdir()
    content = json.loads(file.read_text())
    if written:
        written = {self_test.name(variant()): written["name"]}
    file.write_text(json.dumps(content | {"verdicts": written}))
    hopper.new_process()
    assert launch.usable(variant(), CPU)
    assert len(hopper) == 2


@pytest.mark.parametrize("change", ["gpu", "capability", "triton", "ptxas", "sources"])
def test_another_environment_is_tested_anew(hopper, change, monkeypatch, tmp_path):
    launch.usable(variant(), CPU)
    hopper.new_process()
    if change == "gpu":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    elif change == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 1))
    elif change == "triton":
        monkeypatch.setattr(triton, "__version__", "3.7.1")
    elif change == "ptxas":
        monkeypatch.setattr(ptxas, "version", lambda: "13.5.37")
    else:
        (tmp_path / "launch.py").write_text("TABLE = {}")
        monkeypatch.setattr(verdicts, "__file__", str(tmp_path / "verdicts.py"))
    launch.usable(variant(), CPU)
    assert hopper == [variant(), variant()]
    assert len(list(hopper.folder.iterdir())) == 2


@pytest.mark.parametrize("place", ["a file", "no home"])
def test_where_nothing_can_be_written_it_is_tested_in_every_process(
    hopper, place, monkeypatch, tmp_path
):
    if place == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError()))
    for _ in range(2):
        assert launch.usable(variant(), CPU)
        assert launch.usable(variant(), CPU)
        hopper.new_process()
    assert len(hopper) == 2


def test_the_cache_is_in_the_home_directory_by_default(hopper, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    launch.usable(variant(), CPU)
    (file,) = (tmp_path / "home" / ".cache" / "llmos_fast").iterdir()
    assert file.suffix == ".json"


def test_while_a_graph_is_captured_only_a_verdict_that_is_kept_counts(hopper, monkeypatch):
    hopper.wrong = (TILES,)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launch.usable(variant(), CPU)
    assert not hopper
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(UserWarning, match="is wrong on"):
        assert not launch.usable(variant(), CPU)
    hopper.new_process()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match="is wrong on"):
        assert not launch.usable(variant(), CPU)
    assert len(hopper) == 1


def test_fake_tensors_and_a_full_memory_wait_for_another_call(hopper, monkeypatch):
    with FakeTensorMode():
        assert launch.usable(variant(), CPU)
    assert not hopper

    def full(variant, device):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(self_test, "passes", full)
        assert launch.usable(variant(), CPU)
    assert launch.usable(variant(), CPU)
    assert hopper == [variant()]


def test_threads_wait_for_one_test(hopper, monkeypatch, tmp_path):
    # nothing is kept, so the second thread can know only from the first
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    second_waits = threading.Event()
    answers = []

    def slow(variant, device):
        second_waits.wait()
        return hopper(variant, device)

    def ask():
        answers.append(launch.usable(variant(), CPU))

    monkeypatch.setattr(self_test, "passes", slow)
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    # both have looked, and one of them holds the lock
    threads[1].join(timeout=0.2)
    second_waits.set()
    for thread in threads:
        thread.join()
    assert answers == [True, True]
    assert hopper == [variant()]


@pytest.mark.parametrize(
    ("capability", "dtype", "applies"),
    [
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float16, True),
        ((9, 0), torch.float32, False),
        ((8, 0), torch.bfloat16, False),
        ((10, 0), torch.bfloat16, False),
        ((12, 0), torch.bfloat16, False),
    ],
    ids=str,
)
def test_it_applies_to_16_bits_on_hopper(capability, dtype, applies, monkeypatch):
    device = torch.device("cuda", 0)
    self_test._is_hopper.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(self_test, "INTERPRETED", False)
    assert self_test.applies(device, dtype) == applies
    self_test._is_hopper.cache_clear()
    monkeypatch.setattr(self_test, "INTERPRETED", True)
    assert not self_test.applies(device, dtype)
    self_test._is_hopper.cache_clear()
    assert not self_test.applies(CPU, dtype)


def test_nothing_runs_elsewhere(monkeypatch):
    monkeypatch.setattr(self_test, "passes", None)
    x = random(1, 1, 4, 8, dtype=torch.bfloat16)
    assert launch.usable(variant(), CPU)
    assert self_test.refusal(x, x, x, hides=False) is None


# which launch is taken

SPECIAL = Launch(32, 32, 4, 2, TMA=True, WARP_SPECIALIZE=True, light=True)
LAST = Launch(32, 32, 4, 1)


@pytest.fixture
def table(monkeypatch):
    launches = {64: (SPECIAL, TILES, LAST), 128: (TILES, LAST)}
    entry = {0: {2: launches, 4: launches}}
    bias = "attention_backward_bias"
    monkeypatch.setattr(launch, "TABLE", dict.fromkeys((*self_test.KERNELS, bias), entry))


@pytest.mark.filterwarnings("ignore:llmos_fast")
def test_launches_that_are_struck_off_are_passed_over(hopper, table):
    x = random(1, 1, 40, 16, dtype=torch.bfloat16)
    a = arguments(x)
    assert launch.choose(FORWARD, a, (x,)) == SPECIAL
    hopper.new_process()
    for path in hopper.folder.iterdir():
        path.unlink()
    hopper.wrong = (SPECIAL, TILES)
    assert launch.choose(FORWARD, a, (x,)) == LAST
    # only what would be used is tested
    assert [v.launch for v in hopper] == [SPECIAL, SPECIAL, TILES, LAST]
    # the gradient of a bias multiplies nothing from registers, and fp32 is not tested
    assert launch.choose("attention_backward_bias", a, ()) == SPECIAL
    wide = arguments(x.float())
    assert launch.choose(FORWARD, wide, (wide.query,)) == SPECIAL
    hopper.wrong = (SPECIAL, TILES, LAST)
    with pytest.raises(RuntimeError, match=r"attention: no launch of attention_backward_key .*pip"):
        launch.choose(KEY, a, (x,))


@pytest.mark.filterwarnings("ignore:llmos_fast")
def test_attention_is_refused_where_no_launch_is_left(hopper, table):
    x = random(1, 1, 40, 16, dtype=torch.bfloat16)
    y = random(1, 1, 40, 16, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        assert self_test.refusal(x, x, x, hides=True) is None
    assert [(v.kernel, v.launch) for v in hopper] == [(FORWARD, TILES)]
    hopper.wrong = (TILES, LAST)
    reason = self_test.refusal(y, x, x, hides=True)
    assert reason.startswith("needs a launch of attention_backward_key")
    for part in ("12.8.93", 'pip install "llmos-fast[ptxas]"', "TRITON_PTXAS_PATH"):
        assert part in reason
    with torch.no_grad():
        assert self_test.refusal(y, x, x, hides=True) is None
    assert self_test.refusal(y.float(), x, x, hides=True) is None
    reason = self_test.refusal(x, x, x, hides=False)
    assert reason.startswith("needs a launch of attention_forward")
    wide = random(1, 1, 40, 65, dtype=torch.bfloat16)
    self_test.refusal(x, x, wide, hides=False)
    assert hopper[-1].head_dim == 128


@pytest.mark.filterwarnings("ignore:llmos_fast")
def test_what_was_admitted_is_asked_again_after_a_launch_was_struck_off(hopper, table):
    x = random(1, 1, 40, 16, dtype=torch.bfloat16)
    assert self_test.refusal(x, x, x, hides=False) is None
    launch.struck_off.add(variant())
    hopper.wrong = (SPECIAL, LAST)
    with pytest.raises(RuntimeError, match="no launch"):
        launch.choose(FORWARD, arguments(x), (x,))
    assert "attention_forward" in self_test.refusal(x, x, x, hides=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:llmos_fast")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wrong", [(), (TILES, LAST)], ids=["right", "wrong"])
def test_a_compiled_call_is_refused_while_it_is_traced(hopper, table, dynamic, wrong):
    torch._dynamo.reset()
    hopper.wrong = wrong

    def call(x, window):
        hides = max(window) >= 0
        return x + 1 if self_test.refusal(x, x, x, hides) is None else x - 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = torch.zeros(1, 1, 40, 16, dtype=torch.bfloat16)
    for window in ((-1, -1), (5, 2)):
        assert compiled(x, window).unique() == (-1.0 if wrong else 1.0)
    assert {v.hides for v in hopper} == {False, True}


def test_run_tests_the_whole_table(hopper, table):
    hopper.wrong = (LAST,)
    failed = self_test.run(CPU)
    # 3 kernels of 3 + 2 launches, 2 dtypes, hidden or not
    assert len(hopper) == 3 * 5 * 2 * 2
    assert len(set(hopper)) == len(hopper)
    assert failed == [v for v in hopper if v.launch == LAST]
    assert not hopper.folder.exists()
