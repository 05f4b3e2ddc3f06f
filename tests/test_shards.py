"""A pass over a data set, cut, killed, resumed and spread over processes, against a plain loop over the batches."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import lipconvert as lc
from lipconvert.foundation import shards

SIZE, BATCH, SHARD = 53, 4, 10  # 14 batches, the last of 1; shards of 12 samples, the last of 5
SHARDS = 5
MANY = 40 * 12  # samples of 40 shards
PATIENCE = 60  # seconds after which a process that should have ended is killed: a hang is a failure


class Pairs:
    """(input, label) pairs that know which of them were asked for; ``label`` makes a label of an int."""

    def __init__(self, size=SIZE, label=int):
        self.x = torch.randn(MANY, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)[:size]
        self.label, self.asked = label, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if not 0 <= index < len(self.x):
            raise IndexError(index)
        self.asked.append(index)
        return self.x[index], self.label(index % 10)


class Work:
    """Results of many kinds, which depend on the batch mates of a sample too, so that another cut shows."""

    def __init__(self, pause=0.0, log=None):
        self.pause, self.log, self.starts = pause, log, []

    def __call__(self, x, labels, start):
        self.starts.append(start)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{start}\n")
        time.sleep(self.pause)
        mixed = torch.tanh(x) @ x.mT @ torch.ones(len(x), dtype=x.dtype) / 3
        extremes = torch.stack([torch.full_like(mixed, float("nan")), -torch.zeros_like(mixed), mixed.exp()], 1)
        return {
            "radius": mixed,
            "right": mixed > labels,
            "place": torch.arange(start, start + len(x)),
            "half": extremes.to(torch.bfloat16),
        }


def straight(data, batch=BATCH):
    """The results of a plain loop."""
    parts = []
    for start in range(0, len(data), batch):
        rows = [data[index] for index in range(start, min(start + batch, len(data)))]
        parts.append(Work()(torch.stack([x for x, _ in rows]), torch.tensor([int(y) for _, y in rows]), start))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def bits(results):
    return {
        name: (value.dtype, value.shape, bytes(value.contiguous().view(torch.uint8).numpy()))
        for name, value in results.items()
    }


def run(data=None, work=None, **options):
    options = {"batch_size": BATCH, "shard_size": SHARD, **options}
    return shards.over(Pairs() if data is None else data, work or Work(), **options)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def file_of(index):
    return f"shard-{index:05d}.safetensors"


def loader(data=None, **options):
    return DataLoader(Pairs() if data is None else data, **{"batch_size": BATCH, **options})


# --- one process


@pytest.mark.parametrize("size", [1, 3, 4, 12, 13, 53])
@pytest.mark.parametrize(("batch", "shard"), [(1, 1), (4, 10), (4, 12), (5, 1), (60, 7), (7, 1000)])
def test_the_results_are_those_of_a_plain_loop(tmp_path, size, batch, shard):
    data = Pairs(size)
    expected = bits(straight(data, batch))
    for options in ({}, {"folder": tmp_path}, {"folder": str(tmp_path)}):
        assert bits(run(data, batch_size=batch, shard_size=shard, **options)) == expected
    per_shard = -(-shard // batch) * batch
    assert files(tmp_path) == [file_of(k) for k in range(-(-size // per_shard))]


@pytest.mark.parametrize(
    "data",
    [
        Pairs(label=torch.tensor),
        Pairs(label=lambda label: torch.tensor(label, dtype=torch.uint8)),
        [Pairs()[k] for k in range(SIZE)],
        [list(Pairs()[k]) for k in range(SIZE)],
        TensorDataset(Pairs().x, torch.arange(SIZE) % 10),
        loader(),
        loader(num_workers=1),
        DataLoader(Pairs(), batch_sampler=[range(k, min(k + 4, SIZE)) for k in range(0, SIZE, 4)]),
        DataLoader(
            [(Pairs().x[k : k + 4], torch.arange(k, min(k + 4, SIZE)) % 10) for k in range(0, SIZE, 4)], batch_size=None
        ),
    ],
    ids=["0-d", "uint8", "list", "lists", "TensorDataset", "loader", "workers", "batch sampler", "batches"],
)
def test_every_kind_of_data(tmp_path, data):
    expected = bits(straight(Pairs()))
    assert bits(run(data)) == expected
    assert bits(run(data, folder=tmp_path)) == expected
    work = Work()
    assert bits(run(data, work, folder=tmp_path)) == expected
    assert work.starts == []


def test_a_loader_with_batches_of_its_own_sizes(tmp_path):
    """A shard ends with the batch that reaches its size, whatever the batches are."""
    cuts = [(0, 1), (1, 9), (9, 25), (25, 30), (30, 36), (36, 53)]
    data = DataLoader(Pairs(), batch_sampler=[range(*cut) for cut in cuts])
    work = Work()
    found = run(data, work, folder=tmp_path)
    assert work.starts == [0, 1, 9, 25, 30, 36]
    x, labels = Pairs().x, torch.arange(SIZE) % 10
    parts = [Work()(x[a:b], labels[a:b], a) for a, b in cuts]
    assert bits(found) == bits({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    assert len(files(tmp_path)) == 3  # 25, 11 and 17 samples


def test_nothing_is_drawn_from_the_global_generators():
    def state():
        return torch.random.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = state()
    for data in (Pairs(), loader(), loader(num_workers=1)):
        run(data)
        assert state() == before


def test_only_one_batch_of_inputs_is_held():
    alive = weakref.WeakSet()

    class Fresh(Pairs):
        def __getitem__(self, index):
            x, label = super().__getitem__(index)
            x = x.clone()
            alive.add(x)
            return x, label

    def work(x, labels, start):
        assert len(alive) <= 2 * BATCH
        alive.add(x)
        return {"y": x[:, 0], "x": x.sum(1)}  # y is a view of the inputs

    assert len(run(Fresh(), work, shard_size=1000)["y"]) == SIZE
    run(loader(Fresh()), work, shard_size=1000)


def test_buffers_of_work_may_be_used_again_and_gradients_end_here():
    buffer = torch.zeros(BATCH)
    weight = nn.Parameter(torch.ones(()))

    def work(x, labels, start):
        torch.arange(start, start + BATCH, out=buffer)
        return {"y": buffer[: len(x)], "z": weight * x[:, 0]}

    found = run(None, work)
    assert torch.equal(found["y"], torch.arange(SIZE, dtype=torch.float64))
    assert not found["z"].requires_grad


def test_progress(tmp_path):
    calls = []
    run(seen=lambda *call: calls.append(call))
    assert calls == [(min(4 * k, SIZE), SIZE) for k in range(1, 15)]
    calls.clear()
    run(loader(), seen=lambda *call: calls.append(call))
    assert calls == [(min(4 * k, SIZE), SIZE) for k in range(1, 15)]
    calls.clear()
    run(loader(drop_last=True), seen=lambda *call: calls.append(call))
    assert calls == [*((4 * k, None) for k in range(1, 14)), (52, 52)]
    run(folder=tmp_path)
    for index in (1, 4):
        (tmp_path / file_of(index)).unlink()
    calls.clear()
    run(folder=tmp_path, seen=lambda *call: calls.append(call))
    assert calls == [(k, SIZE) for k in (12, 16, 20, 24, 36, 48, 52, 53)]


# --- a folder


def test_what_is_finished_is_not_computed_again(tmp_path):
    folder = tmp_path / "new" / "folder"
    expected = bits(run(folder=folder))
    assert files(folder) == [file_of(k) for k in range(SHARDS)]
    (folder / file_of(1)).unlink()
    data, work = Pairs(), Work()
    assert bits(run(data, work, folder=folder)) == expected
    assert work.starts == [12, 16, 20]
    assert data.asked == [*range(12), *range(24, SIZE), *range(12, 24)]  # read, to see that the data are the same


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_fails_anywhere_goes_on(tmp_path, seed):
    rng = random.Random(seed)
    computed = []

    def work(x, labels, start):
        if rng.random() < 0.2:
            raise RuntimeError("lost")
        computed.append(start)
        return Work()(x, labels, start)

    for _ in range(1000):
        try:
            found = run(None, work, folder=tmp_path)
            break
        except RuntimeError:
            continue
    assert bits(found) == bits(straight(Pairs()))
    assert len(computed) < 14 * 5  # on average 3 attempts for a shard; never from the beginning


def interrupted(folder, log):
    run(Pairs(MANY), Work(0.005, log), folder=folder, key="k")


def test_killed_five_times(tmp_path):
    rng, folder, done = random.Random(0), tmp_path / "folder", set()
    for k in range(5):
        log, wait = tmp_path / f"log-{k}", rng.randint(1, 20)
        log.touch()
        process = process_of(interrupted, folder, log)
        while len(log.read_text().split()) < wait and process.is_alive():  # batches begun
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.02))
        process.kill()
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        again = {int(start) // 12 for start in log.read_text().split()} & done
        assert again == set()
        done = {int(path.name[6:11]) for path in folder.glob("*.safetensors")}
    assert 0 < len(done) < 40
    (folder / (file_of(39) + ".partial")).write_bytes(b"left behind")
    work = Work()
    assert bits(run(Pairs(MANY), work, folder=folder, key="k")) == bits(straight(Pairs(MANY)))
    assert {start // 12 for start in work.starts} == set(range(40)) - done
    assert files(folder) == [file_of(k) for k in range(40)]


def test_a_shard_that_is_cut_short_or_damaged_is_computed_again(tmp_path):
    expected = bits(run(folder=tmp_path))
    path = tmp_path / file_of(2)
    content, whole = path.read_bytes(), bits(load_file(path))
    header = 8 + int.from_bytes(content[:8], "little")
    seal = content.index(b'"samples":"') + len(b'"samples":"')
    damaged = [content[:length] for length in (*range(0, len(content), 97), len(content) - 1)]
    damaged += [content + b"x", b"other", b"\xff" * len(content)]
    for place in (seal, header, header + 40, len(content) - 1):
        damaged.append(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    for wrong in damaged:
        path.write_bytes(wrong)
        work = Work()
        assert bits(run(None, work, folder=tmp_path)) == expected
        assert work.starts == [24, 28, 32]
        assert bits(load_file(path)) == whole


def test_files_that_are_none_of_ours_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "shard-1.safetensors").write_text("mine")
    (tmp_path / (file_of(0) + ".partial")).write_bytes(b"torn")
    assert bits(run(folder=tmp_path)) == bits(straight(Pairs()))
    assert files(tmp_path) == ["notes.txt", *(file_of(k) for k in range(SHARDS)), "shard-1.safetensors"]


def test_a_refusal_names_what_differs(tmp_path):
    run(folder=tmp_path, key='{"network": "abc", "method": "tightened", "seconds": null}')
    with pytest.raises(lc.InvalidParameterError) as caught:
        run(folder=tmp_path, key='{"network": "abc", "method": "pairwise", "seconds": 3.0}')
    assert "made with another method (tightened, here pairwise), another seconds (None, here 3.0): use" in str(
        caught.value
    )


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, named = [], []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), fsync(file)))

    def checked(self, target):
        assert self.stat().st_ino in synced
        named.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", checked)
    run(folder=tmp_path)
    assert named == [file_of(k) for k in range(SHARDS)]


class Changed(Pairs):
    """One sample is another one; ``label``: its label only."""

    def __init__(self, index, label=False, size=SIZE):
        super().__init__(size)
        self.index, self.change_label = index, label

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        if index != self.index:
            return x, y
        return (x, y + 1) if self.change_label else (x + 1e-15, y)


class Single(Pairs):
    """In another dtype."""

    def __getitem__(self, index):
        x, label = super().__getitem__(index)
        return x.float(), label


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (Pairs(), {"key": "b"}, r"shard-00001.safetensors was made with the key 'a', not 'b' \(other weights or"),
        (Pairs(), {"key": '{"a": 1}'}, r"was made with the key 'a', not '{\"a\": 1}'"),
        (Pairs(), {"batch_size": 5}, r"end at samples 12 16 20 24, here at 10 15 20: another batch_size"),
        (Pairs(), {"shard_size": 13}, r"end at samples 12 16 20 24, here at 16 20 24 28 32"),
        (Pairs(50), {}, r"shard-00004.safetensors was cut .* 48 52 53, here at 48 50: .* number of samples"),
        (Pairs(54), {}, r"shard-00004.safetensors was cut .* 48 52 53, here at 48 52 54: .* number of samples"),
        (Changed(12), {}, r"shard-00001.safetensors was made from other data in samples 12 to 23: use another folder"),
        (Changed(14, label=True), {}, r"shard-00001.safetensors was made from other data"),
        (Changed(23), {}, r"shard-00001.safetensors was made from other data in samples 12 to 23"),
        (Changed(28), {}, r"shard-00002.safetensors was made from other data in samples 24 to 35"),
        (Changed(16, label=True), {}, r"shard-00001.safetensors was made from other data"),
        (Single(), {}, r"shard-00001.safetensors was made from other data"),
        (loader(Changed(23)), {}, r"shard-00001.safetensors was made from other data"),
        (loader(Changed(23, label=True)), {}, r"shard-00001.safetensors was made from other data"),
        (loader(drop_last=True), {}, r"shard-00004.safetensors was cut"),
        (loader(batch_size=5), {}, r"shard-00001.safetensors was cut"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str | dict) else str(value)[:20],
)
def test_a_folder_of_another_run_is_refused(tmp_path, data, options, message):
    run(folder=tmp_path, key="a")
    (tmp_path / file_of(0)).unlink()  # what is wrong with a later shard is known before the first is computed
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    work = Work()
    with pytest.raises(lc.InvalidParameterError, match=message) as caught:
        run(data, work, **{"folder": tmp_path, "key": "a", **options})
    assert str(tmp_path) in str(caught.value)
    assert "use another folder, or delete this one" in str(caught.value)
    after = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    if isinstance(data, DataLoader):
        after.pop(file_of(0), None)  # a loader is read but once, in order
    else:
        assert work.starts == []
    assert after == before


def test_a_file_of_another_program_is_refused(tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / file_of(3))
    with pytest.raises(lc.InvalidParameterError, match="shard-00003"):
        run(folder=tmp_path)
    assert files(tmp_path) == [file_of(3)]
    (tmp_path / "file").touch()
    with pytest.raises(lc.InvalidParameterError, match="must be a folder"):
        run(folder=tmp_path / "file")


# --- what is refused


class Stream(IterableDataset):
    def __iter__(self):
        yield from ((x, k % 10) for k, x in enumerate(Pairs().x))


def seeded(**options):
    return loader(generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize(
    "data",
    [
        seeded(shuffle=True),
        loader(Stream()),
        loader(sampler=DistributedSampler(Pairs(), 2, 0, shuffle=False)),
        loader(in_order=False, num_workers=1),
        DataLoader(Pairs(), batch_sampler=iter([[0, 1], [2]])),
    ],
    ids=["shuffled", "iterable", "distributed", "workers in any order", "iterator"],
)
def test_a_loader_without_a_known_order(tmp_path, data):
    with pytest.raises(lc.InvalidParameterError, match=r"order .* give the data set itself, or DataLoader"):
        run(data, folder=tmp_path)
    assert files(tmp_path) == []
    assert len(run(data)["place"]) in (3, 27, SIZE)


@pytest.mark.parametrize("data", [[], Pairs(0), DataLoader([]), TensorDataset(torch.zeros(0, 3), torch.zeros(0))])
def test_there_must_be_data(tmp_path, data):
    for folder in (None, tmp_path):
        with pytest.raises(lc.InvalidParameterError, match="data is empty"):
            run(data, folder=folder)


@pytest.mark.parametrize(
    "data",
    [
        None,
        "digits",
        3,
        Stream(),
        [torch.zeros(3)],
        [torch.zeros(2)],
        [{"x": 1}],
        [(torch.zeros(3), "cat")],
        [(torch.zeros(3), 1, 2)],
        [(torch.zeros(3), None)],
        [(object(), 1)],
        [(torch.zeros(3), 1), (torch.zeros(4), 1)],
        [(torch.zeros(3), 1), (torch.zeros(3),)],
        DataLoader([torch.zeros(3)]),
        DataLoader([(torch.zeros(3), "cat")]),
    ],
)
def test_samples_must_be_pairs(data):
    with pytest.raises(lc.InvalidParameterError, match=r"^data"):
        shards.over(data, Work())


@pytest.mark.parametrize("data", [[(torch.zeros(3), torch.zeros(1))], [(torch.zeros(3), torch.zeros(2, 2))]])
def test_labels_must_be_numbers(data):
    for found in (data, DataLoader(data)):
        with pytest.raises(lc.ShapeError, match="labels"):
            run(found)
    short = DataLoader([(torch.zeros(2, 3), torch.zeros(3))], batch_size=None)
    with pytest.raises(lc.ShapeError, match="labels"):
        run(short)


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda x, y, k: {"y": x[1:]}, lc.ShapeError, r"'y' has shape \(3, 3\), expected \(4, \.\.\.\)"),
        (lambda x, y, k: {"y": x.sum()}, lc.ShapeError, "'y'"),
        (lambda x, y, k: x, lc.InvalidParameterError, "Tensor, but it must be tensors by name"),
        (lambda x, y, k: {"y": [1.0] * len(x)}, lc.InvalidParameterError, "tensors by name"),
        (lambda x, y, k: {"y": x if k else x.float()}, lc.InvalidParameterError, "another batch"),
        (lambda x, y, k: {"y": x if k < 12 else x[:, :2]}, lc.InvalidParameterError, "another batch"),
        (lambda x, y, k: {f"y{k // 12}": x}, lc.InvalidParameterError, "another batch"),
    ],
)
def test_results_must_be_rows_of_one_kind(tmp_path, work, error, message):
    for options in ({}, {"folder": tmp_path}):
        with pytest.raises(error, match=message):
            run(None, work, **options)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -1}, {"shard_size": 0}])
def test_sizes_must_be_positive(options):
    with pytest.raises(lc.InvalidParameterError, match=next(iter(options))):
        run(**options)


# --- fingerprints


class Stateful(nn.Linear):
    def __init__(self, state):
        super().__init__(2, 2)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def key_of_a_network():
    return shards.fingerprint(lc.registry().example_models("sll", seed=0)[0], radii=[0.1, 1.0], steps=3)


def fingerprints():
    def linear(*sizes, dtype=torch.float64, **options):
        torch.manual_seed(0)
        return nn.Linear(*sizes, dtype=dtype, **options)

    ones = torch.ones(2, 3)
    kinds = [
        [linear(2, 3)],
        [linear(3, 2)],
        [linear(2, 3, bias=False)],
        [linear(2, 3, dtype=torch.float32)],
        [nn.Sequential(linear(2, 3))],
        [nn.Sequential(linear(2, 3), nn.ReLU())],
        [nn.Sequential(linear(2, 3), nn.LeakyReLU(0.1))],
        [nn.Sequential(linear(2, 3), nn.LeakyReLU(0.2))],
        [linear(2, 3), linear(2, 3)],
        [ones],
        [ones.mT.contiguous()],
        [ones.float()],
        [torch.zeros(2, dtype=torch.int32)],
        [torch.zeros(2, dtype=torch.float32)],
        [ones * (1 + 2**-52)],
        [-ones * 0],
        [ones * 0],
        [torch.ones(2), torch.ones(2, 2)],
        [torch.ones(2, 2), torch.ones(2)],
    ]
    kinds += [[Stateful(state).requires_grad_(False)] for state in ({"L": 1.0}, {"L": 2.0}, {"T": ones}, {"T": -ones})]
    for kind in kinds[-4:]:
        kind[0].load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, strict=False)
    options = [
        {},
        {"a": 1},
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        {"b": 1},
        {"a": None},
        {"a": [1, 2]},
        {"a": [2, 1]},
        {"a": {"b": 1}},
        {"a": ones},
        {"a": -ones},
        {"a": 0.1},
        {"a": 0.1 + 2**-55},
        {"a": -0.0},
        {"a": 0.0},
    ]
    return [shards.fingerprint(*kind) for kind in kinds] + [shards.fingerprint(ones, **each) for each in options[1:]]


def test_a_fingerprint_tells_what_differs():
    found = fingerprints()
    assert len(set(found)) == len(found)
    assert fingerprints() == found
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in found)
    assert shards.fingerprint(a=(1, 2), b={"c": 1, "d": 2}) == shards.fingerprint(b={"d": 2, "c": 1}, a=[1, 2])
    column = torch.arange(6.0).reshape(2, 3)
    assert shards.fingerprint(column.mT) == shards.fingerprint(column.mT.contiguous())


def test_a_fingerprint_follows_every_weight_of_a_network():
    net = lc.convert(lc.registry().example_models("cpl", seed=0)[0].double(), check=False)
    key = shards.fingerprint(net)
    with torch.no_grad():
        for parameter in net.parameters():
            entry = parameter.view(-1)[-1:]
            before = entry.clone()
            entry.copy_(torch.nextafter(before, torch.tensor(torch.inf, dtype=before.dtype)))
            assert shards.fingerprint(net) != key
            entry.copy_(before)
            assert shards.fingerprint(net) == key
    net.stages[0].lipschitz *= 1 + 1e-15
    assert shards.fingerprint(net) != key


def test_only_plain_data_has_a_fingerprint():
    for value in (object(), {1, 2}, Path("x"), torch.float32, {(1, 2): 3}):
        with pytest.raises(lc.InvalidParameterError, match="only plain data and tensors have a fingerprint"):
            shards.fingerprint(a=value)
    with pytest.raises(lc.InvalidParameterError, match="extra state"):
        shards.fingerprint(Stateful(object()))


# --- several processes


def process_of(target, *arguments):
    """A process that calls a function of this file; torch is imported once, for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lipconvert", "pytest"])
    # Not by reference: the name of this module is pytest's, and nobody else's.
    task = {"TASK": (target.__name__, *arguments)}
    process = context.Process(target=runpy.run_path, args=(__file__, task, "__main__"))
    process.start()
    return process


def member(target, rank, world, folder, arguments):
    """One process of a gloo group; what it gives, or the error, goes to a file."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        found = globals()[target](rank, *arguments)
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 (pytest is told)
        found = traceback.format_exc()
    torch.save(found, folder / f"{rank}.pt")


def together(world, folder, target, *arguments):
    """What ``target(rank, *arguments)`` gives on each process of a group."""
    folder.mkdir()
    members = [process_of(member, target.__name__, rank, world, folder, arguments) for rank in range(world)]
    for process in members:
        process.join(PATIENCE)
    hung = [rank for rank, process in enumerate(members) if process.is_alive()]
    for rank in hung:
        members[rank].kill()
    assert hung == []
    found = [folder / f"{rank}.pt" for rank in range(world)]
    found = [torch.load(file, weights_only=False) if file.exists() else None for file in found]
    for text in found:
        assert not isinstance(text, str), text
    return found


def watched(data, **options):
    """Results, the batches that were computed, the samples that were asked for, the progress."""
    work, calls = Work(), []
    results = run(data, work, seen=lambda *call: calls.append(call), **options)
    return bits(results), work.starts, (data.dataset if isinstance(data, DataLoader) else data).asked, calls


def spread(rank, folder):
    found = {
        "memory": watched(Pairs()),
        "folder": watched(Pairs(), folder=folder / "a"),
        "again": watched(Pairs(), folder=folder / "a"),
        "resumed": watched(Pairs(), folder=folder / "begun"),
        "loader": watched(loader()),
        "loader resumed": watched(loader(), folder=folder / "begun by a loader"),
        "one shard": watched(Pairs(3)),
        "two shards": watched(Pairs(13)),
        "key": key_of_a_network(),
    }
    # many short runs after one another: nobody leaves a group before the others have read
    for size in range(1, 40):
        assert bits(run(Pairs(size), shard_size=1)) == bits(straight(Pairs(size)))
    with shards.processes() as place:  # a group that is there is used, and stays
        found["place"] = place
    assert dist.is_initialized()
    assert len(dist.distributed_c10d._world.pg_map) == 1  # no group is left behind
    return found


def begin(folder, data):
    """Two shards of five, the first and the fourth, as one process leaves them that was lucky."""
    run(data, folder=folder)
    for index in (1, 2, 4):
        (folder / file_of(index)).unlink()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_work(tmp_path, world):
    begin(tmp_path / "begun", Pairs())
    begin(tmp_path / "begun by a loader", loader())
    found = together(world, tmp_path / "group", spread, tmp_path)
    expected = {name: bits(straight(Pairs(size))) for name, size in (("one shard", 3), ("two shards", 13))}
    every = bits(straight(Pairs()))
    batches = list(range(0, SIZE, BATCH))
    missing = [start for start in batches if start // 12 in (1, 2, 4)]
    for rank, results in enumerate(found):
        for name, result in results.items():
            if name not in ("key", "place"):
                assert result[0] == expected.get(name, every), name
        mine = [start for start in batches if start // 12 % world == rank]
        for name in ("memory", "folder", "loader"):
            assert results[name][1] == mine
        for name in ("resumed", "loader resumed"):
            assert results[name][1] == [start for start in missing if start // 12 % world == rank]
        assert results["again"][1] == []
        assert results["memory"][2] == [k for k in range(SIZE) if k // 12 % world == rank]
        assert results["again"][2] == [k for k in range(SIZE) if k // 12 % world == rank]
        assert results["loader"][2] == list(range(SIZE))
        made = [k for k in range(SIZE) if k // 12 not in (1, 2, 4) and k // 12 % world == rank]
        assert results["resumed"][2] == made + [
            k for k in range(SIZE) if k // 12 in (1, 2, 4) and k // 12 % world == rank
        ]
        assert results["one shard"][1] == ([0] if rank == 0 else [])
        assert results["two shards"][1] == {0: [0, 4, 8], 1: [12]}.get(rank, [])
        for name in ("memory", "folder", "again", "resumed", "loader"):
            calls = results[name][3]
            assert calls == sorted(calls)
            assert calls[-1] == (SIZE, SIZE)
        assert results["resumed"][3][0] == (12, SIZE)  # whoever made it
        assert results["key"] == key_of_a_network()
        assert results["place"] == (rank, world)
    # what several processes made is whole for one
    for folder in ("a", "begun", "begun by a loader"):
        work = Work()
        assert bits(run(None, work, folder=tmp_path / folder)) == every
        assert work.starts == []
        assert files(tmp_path / folder) == [file_of(k) for k in range(SHARDS)]


def failures(rank, folder):
    """For each case: the error of this process, as text, and the batches it has computed."""

    def failing(x, labels, start):
        if start == 16:
            raise ValueError("nobody knows why")
        return Work()(x, labels, start)

    def last(x, labels, start):
        return Work()(x if start < 52 else x[:0], labels, start)

    batches = [range(k, k + 4) for k in range(0, 52, 4)]
    cases = {
        "work": (Pairs(), failing, {}),
        "rows": (Pairs(), last, {}),
        "data": ([(torch.zeros(3), 1)] * 12 + [torch.zeros(3)], Work(), {}),
        "folder": (Changed(12), Work(), {"folder": folder / "made"}),
        "key": (Pairs(), Work(), {"folder": folder / "made", "key": "b"}),
        "different keys": (Pairs(), Work(), {"key": str(rank)}),
        "different lengths": (Pairs(20 + rank), Work(), {}),
        "different loaders": (DataLoader(Pairs(), batch_sampler=batches[: 13 - 3 * rank]), Work(), {}),
        "shuffled": (seeded(shuffle=True), Work(), {}),
        "empty": (Pairs(0), Work(), {}),
        "empty loader": (DataLoader([]), Work(), {}),
    }
    found = {}
    for name, (data, work, options) in cases.items():
        try:
            run(data, work, **options)
        except Exception as error:  # noqa: BLE001 (all are looked at)
            found[name] = type(error).__name__, str(error), getattr(work, "starts", None)
    assert bits(run()) == bits(straight(Pairs()))  # the group is as good as before
    return found


def test_what_one_process_raises_all_raise(tmp_path):
    run(folder=tmp_path / "made")
    first, second = together(2, tmp_path / "group", failures, tmp_path)
    other = "process 1 failed: "
    assert first["work"][:2] == ("ProcessError", other + "ValueError: nobody knows why")
    assert second["work"][:2] == ("ValueError", "nobody knows why")
    assert first["rows"][0] == "ShapeError"
    assert second["rows"][:2] == ("ProcessError", "process 0 failed: ShapeError: " + first["rows"][1])
    assert first["data"][0] == "ProcessError"
    assert second["data"][0] == "InvalidParameterError"
    # refused before anything is computed, also where nothing was wrong
    assert first["folder"][0] == "ProcessError"
    assert "shard-00001.safetensors was made from other data" in first["folder"][1]
    assert second["folder"][0] == "InvalidParameterError"
    for name in ("folder", "key", "different keys", "different lengths", "shuffled"):
        assert first[name][2] == second[name][2] == [], name
    for name in (
        "key",
        "different keys",
        "different lengths",
        "different loaders",
        "shuffled",
        "empty",
        "empty loader",
    ):
        assert first[name][:2] == second[name][:2], name
        assert first[name][0] == "InvalidParameterError", name
    assert "all processes of a run need the same data" in first["different lengths"][1]


def dying(rank):
    def work(x, labels, start):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Work()(x, labels, start)

    with pytest.raises(shards.ProcessError, match="another process failed: the connection to it is lost") as caught:
        run(None, work)
    return caught.value.process, rank


def test_a_process_that_is_killed_does_not_hang_the_others(tmp_path):
    assert together(2, tmp_path / "group", dying) == [(None, 0), None]


def test_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = bits(straight(Pairs()))
    for rank in (0, 1):
        place, found, starts = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert place == (rank, 2)
        assert found == expected
        assert starts == [start for start in range(0, SIZE, BATCH) if start // 12 % 2 == rank]
    assert files(tmp_path / "folder") == [file_of(k) for k in range(SHARDS)]


def test_one_process_needs_no_group(monkeypatch):
    with shards.processes() as place:
        assert place == (0, 1)
        assert not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "4")  # of a scheduler, without an address to meet at
    with shards.processes() as place:
        assert place == (0, 1)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with shards.processes() as place:
        assert place == (0, 1)
        assert not dist.is_initialized()


def torchrun(folder):
    """A process under torchrun."""
    warnings.simplefilter("error")
    work = Work()
    with shards.processes() as place:
        found = run(Pairs(), work, folder=folder / "folder")
    assert not dist.is_initialized()
    torch.save((place, bits(found), work.starts), folder / f"{place[0]}.pt")


if __name__ == "__main__":
    task, *given = globals().get("TASK", ("torchrun", Path(sys.argv[-1])))
    globals()[task](*given)
