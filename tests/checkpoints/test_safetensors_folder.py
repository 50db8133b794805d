"""Hugging Face's folders: what transformers wrote is read, and nothing that is damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmos_fast.checkpoints.source import open_source

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path, header, data=b"", length=None):
    """A safetensors file of a header (JSON, or its bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    (path.parent / "config.json").write_text('{"model_type": "llama"}')
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path.parent


@pytest.fixture
def sharded(tmp_path, make_model):
    make_model("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "qwen2", "bert", "t5", "t5 gated"])
def test_what_transformers_saves_is_read(name, shard, tmp_path, make_model, logits_of):
    model = make_model(name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "20KB")
    source = open_source(tmp_path)
    assert source.config == json.loads((tmp_path / "config.json").read_text())
    stored = {key: value for file in files for key, value in load_file(file).items()}
    assert source.tensors.keys() == stored.keys()
    state = model.state_dict()
    for key, tensor in source.tensors.items():
        assert torch.equal(tensor, state[key])
    assert torch.equal(logits_of(source), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.float8_e4m3fn])
def test_types_are_kept(dtype, tmp_path):
    tensor = torch.arange(12).view(3, 4).to(dtype)
    write(tmp_path / "model.safetensors", {})
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    got = open_source(tmp_path).tensors["a"]
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))


def test_opening_reads_no_tensor(tmp_path, memory_grows):
    count = 1 << 28
    entry = {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}
    folder = write(tmp_path / "model.safetensors", {"a": entry})
    with (tmp_path / "model.safetensors").open("ab") as file:  # 1 GiB that takes no disk
        file.truncate(file.tell() + 4 * count)

    def act():
        source = open_source(folder)
        assert list(source.tensors) == ["a"]
        # a tensor is a view of the file
        assert source.tensors["a"][-1] == 0
        return source

    assert memory_grows(act) < 64 << 20


BROKEN = {
    "no header": (b"", b"", 0),
    "cut off": ({"a": ONE}, bytes(7)),
    "too long": ({"a": ONE}, bytes(9)),
    "header beyond the file": ({"a": ONE}, bytes(8), 1000),
    "header above 100 MB": ({"a": ONE}, bytes(8), 10**8 + 1),
    "header of 2**64 - 1": ({"a": ONE}, bytes(8), 2**64 - 1),
    "overlap": ({"a": ONE, "b": ONE | {"data_offsets": [4, 12]}}, bytes(12)),
    "the same bytes": ({"a": ONE, "b": ONE}, bytes(8)),
    "gap": ({"a": ONE, "b": ONE | {"data_offsets": [12, 20]}}, bytes(20)),
    "backwards": ({"a": ONE | {"data_offsets": [8, 0]}}, bytes(8)),
    "out of range": ({"a": ONE | {"shape": [4], "data_offsets": [0, 16]}}, bytes(8)),
    "negative": ({"a": ONE | {"shape": [-2]}}, bytes(8)),
    "another shape": ({"a": ONE | {"shape": [3]}}, bytes(8)),
    "overflow": ({"a": ONE | {"shape": [2**62, 4], "data_offsets": [0, 0]}}, b""),
    "overflow times zero": ({"a": ONE | {"shape": [2**33, 2**33, 0]}}, b""),
    "unknown type": ({"a": ONE | {"dtype": "F31"}}, bytes(8)),
    "a type torch has not got": (
        {"a": {"dtype": "F6_E2M3", "shape": [32], "data_offsets": [0, 24]}},
        bytes(24),
    ),
    "not UTF-8": (b'{"a\xff": {}}', b""),
    "not an object": (b"[]", b""),
    "nested": (b'{"a":' + b"[" * 100_000, b""),
}
# what safetensors itself reads, the last one counting
TWICE = b'{"a": %s, "a": %s}' % (2 * (json.dumps(ONE).encode(),))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(name, tmp_path, read_or_refuse):
    assert not read_or_refuse(write(tmp_path / "model.safetensors", *BROKEN[name]))


def test_a_name_that_stands_twice_is_refused(tmp_path):
    folder = write(tmp_path / "model.safetensors", TWICE, bytes(8))
    assert load_file(tmp_path / "model.safetensors").keys() == {"a"}
    with pytest.raises(ValueError, match="every name once, got 'a' stands twice"):
        open_source(folder)


CONFIGS = [b"", b"[]", b"{", b'{"a": 1}', b'{"model_type": 3}', b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_broken_configs_are_refused(config, tmp_path, read_or_refuse):
    write(tmp_path / "model.safetensors", {"a": ONE}, bytes(8))
    (tmp_path / "config.json").write_bytes(config)
    assert not read_or_refuse(tmp_path)
    (tmp_path / "config.json").unlink()
    assert not read_or_refuse(tmp_path)


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def outside(folder):
    first = next(folder.glob("*.safetensors"))
    (folder.parent / first.name).write_bytes(first.read_bytes())
    return f"../{first.name}"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("missing.safetensors", "name files that exist"),
        ("../model.safetensors", "of its folder"),
        ("/etc/model.safetensors", "of its folder"),
        ("config.json", "of its folder"),
        ("a\0.safetensors", "of its folder"),
        ("\ud800.safetensors", "of its folder"),
        ("a" * 5000 + ".safetensors", "of its folder"),
        (3, "of its folder"),
    ],
)
def test_shards_are_files_of_the_folder(name, rule, sharded):
    change_index(sharded, lambda weights: weights.update({"lm_head.weight": name}))
    with pytest.raises(ValueError, match=rule) as error:
        open_source(sharded)
    assert type(error.value) is ValueError
    assert len(str(error.value).encode()) < 500


def test_a_shard_outside_of_the_folder_is_refused_though_it_exists(sharded):
    name = outside(sharded)
    assert (sharded / name).is_file()
    change_index(sharded, lambda weights: weights.update(dict.fromkeys(weights, name)))
    with pytest.raises(ValueError, match="of its folder"):
        open_source(sharded)


def test_shards_may_be_links_as_in_the_cache_of_the_hub(sharded):
    expected = {name: tensor.clone() for name, tensor in open_source(sharded).tensors.items()}
    for file in list(sharded.iterdir()):
        file.rename(sharded.parent / f"blob-{file.name}")
        file.symlink_to(sharded.parent / f"blob-{file.name}")
    tensors = open_source(sharded).tensors
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_data_that_begins_at_an_odd_byte_is_read(tmp_path):
    header = json.dumps({"a": ONE}).encode()
    header += b" " * (1 - len(header) % 2)
    values = torch.tensor([1.5, -2.0])
    folder = write(tmp_path / "model.safetensors", header, values.numpy().tobytes())
    assert len(header) % 2 == 1
    assert torch.equal(open_source(folder).tensors["a"], values)


def test_the_index_and_the_shards_agree(sharded):
    change_index(sharded, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"exactly the tensors .* 1 that differ, 'model.norm"):
        open_source(sharded)
    some = next(iter(sharded.glob("*.safetensors"))).name
    change_index(sharded, lambda weights: weights.update({"model.norm.weight": some}))
    change_index(sharded, lambda weights: weights.update({"more": some}))
    with pytest.raises(ValueError, match="exactly the tensors"):
        open_source(sharded)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "3"])
def test_an_index_without_a_map_is_refused(index, sharded, read_or_refuse):
    (sharded / "model.safetensors.index.json").write_text(index)
    assert not read_or_refuse(sharded)


def test_files_damaged_at_random_are_read_or_refused(tmp_path, fuzz):
    tensors = {"a": torch.randn(3, 5), "b": torch.ones(4).half(), "c": torch.ones(1).bfloat16()}
    write(tmp_path / "model.safetensors", {})
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    results = fuzz(tmp_path / "model.safetensors")
    assert min(results.values()) > 20


def test_indexes_damaged_at_random_are_read_or_refused(sharded, fuzz):
    results = fuzz(sharded / "model.safetensors.index.json", sharded)
    assert results[False] > 20
