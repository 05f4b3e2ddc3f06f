"""Two writers of one file at a time, threads and processes: one after the other, or refused; whoever reads meanwhile sees
one network whole. Nothing here waits for luck: a writer is stopped at each thing it does to the disk in turn."""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch

import lipconvert as lc
from lipconvert.checkpoints import container
from lipconvert.checkpoints.documents import Claim
from lipconvert.foundation import files
from lipconvert.interop import hub, interchange

GRAPH, DATA = "net.onnx", "net.safetensors"
KINDS = {"pair": (GRAPH, {}), "embedded": (GRAPH, {"embed": True}), "data alone": (DATA, {})}


@functools.cache
def network(seed):
    model = lc.registry().example_models("sll", seed)[1].double()
    return lc.convert(model, (lc.to_dae(model).inputs,), check=False)


def save(kind, seed, folder):
    name, given = KINDS[kind]
    lc.save(network(seed), folder / name, prove=False, **given)


def seed_of(path, seeds=range(4)):
    """Which of the networks a checkpoint holds, by every bit of it."""
    loaded = lc.load(path).state_dict()
    for seed in seeds:
        expected = network(seed).state_dict()
        if all(torch.equal(loaded[name], value) for name, value in expected.items() if isinstance(value, torch.Tensor)):
            return seed
    raise AssertionError("none of them")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Stopped:
    """A thread that stops before the k-th thing it does to the disk, until it is let go."""

    # What a writer does to the disk, by module and name; `os.open` takes the lock.
    STEPS = ((os, "open"), (Path, "write_bytes"), (Path, "open"), (os, "fsync"), (os, "replace"), (os, "unlink"))

    def __init__(self, monkeypatch, k, work):
        self.reached, self.go, self.count, self.thread = threading.Event(), threading.Event(), 0, None
        self.k, self.work, self.pool = k, work, ThreadPoolExecutor(1)
        for owner, name in self.STEPS:
            monkeypatch.setattr(owner, name, self.stopping(getattr(owner, name)))

    def stopping(self, real):
        def called(*arguments, **options):
            if threading.current_thread() is not self.thread:
                return real(*arguments, **options)
            self.count += 1
            if self.count == self.k:
                self.reached.set()
                assert self.go.wait(60)
            return real(*arguments, **options)

        return called

    def run(self):
        self.thread = threading.current_thread()
        self.work()

    def __enter__(self):
        self.done = self.pool.submit(self.run)
        self.done.add_done_callback(lambda _: self.reached.set())
        assert self.reached.wait(60)
        return self

    @property
    def stopped(self):
        return not self.done.done()

    def __exit__(self, *_):
        self.go.set()
        self.done.result(60)  # raises what was raised in it
        self.pool.shutdown()


@pytest.fixture
def waits(monkeypatch):
    """Set as soon as somebody waits for a lock."""
    waiting = threading.Event()
    real = files._lock

    def lock(path):
        found = real(path)
        if found is None:
            waiting.set()
        return found

    monkeypatch.setattr(files, "_lock", lock)
    monkeypatch.setattr(files, "LOOK", 0.001)
    return waiting


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_a_save_during_a_save(first, second, tmp_path, monkeypatch, waits):
    """For each step of the first: the second waits for it, or has nothing to do with it; both networks are whole."""
    waited = 0
    for k in range(1, 60):
        folder = tmp_path / str(k)
        folder.mkdir()
        save("pair", 0, folder)
        waits.clear()
        with (
            ThreadPoolExecutor(1) as pool,
            monkeypatch.context() as patch,
            Stopped(patch, k, functools.partial(save, first, 1, folder)) as one,
        ):
            stopped = one.stopped
            two = pool.submit(save, second, 2, folder)
            while not two.done() and not waits.is_set():
                wait([two], 0.002)
            if not two.done():  # it waits: whoever reads sees the old network or the first one's, whole
                waited += 1
                for name in {GRAPH, KINDS[first][0]}:
                    with suppress(lc.CheckpointError) if first == "data alone" else nullcontext():
                        assert seed_of(folder / name) in (0, 1)
        two.result(60)
        assert names(folder) == [GRAPH, DATA], "nothing is left over"
        if (first, second) in (("data alone", "pair"), ("pair", "data alone")):
            # whichever was last: its own is whole, and a graph whose data were saved over alone is refused, as ever
            last = seed_of(folder / DATA)
            assert last in (1, 2)
            if {1: first, 2: second}[last] == "pair":
                assert seed_of(folder / GRAPH) == last
            else:
                with pytest.raises(lc.CheckpointError, match="saved alone"):
                    lc.load(folder / GRAPH)
        else:
            assert seed_of(folder / KINDS[first][0]) in (1, 2)
            assert seed_of(folder / KINDS[second][0]) in (1, 2)
        shutil.rmtree(folder)
        if not stopped:
            break
    assert not stopped, "it has stopped at every step"
    assert k > 6
    alike = KINDS[first][0] == KINDS[second][0] or "embedded" not in (first, second)
    assert (waited > 3) == alike


def test_a_reader_between_any_two_steps_of_its_own(tmp_path, monkeypatch):
    """A pair that is saved while it is read is read again: the old one or the new one, never an error."""
    path, calls = tmp_path / GRAPH, []

    def saving(real, k, patch):
        def called(*arguments, **options):
            calls.append(real)
            if len(calls) == k:
                patch.undo()
                save("pair", 1, tmp_path)
            return real(*arguments, **options)

        return called

    for k in range(1, 60):
        save("pair", 0, tmp_path)
        calls.clear()
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "open"), (Path, "stat"), (Path, "read_bytes"), (os.path, "isfile")):
                patch.setattr(owner, name, saving(getattr(owner, name), k, patch))
            found = seed_of(path)
        assert found in (0, 1)
        if len(calls) < k:
            assert found == 0
            break
    assert k > 8


def test_a_pair_that_is_always_another_one_is_given_up(tmp_path, monkeypatch):
    path = tmp_path / GRAPH
    save("pair", 0, tmp_path)
    (tmp_path / DATA).write_bytes((tmp_path / DATA).read_bytes()[:-8])
    readings = []

    def other(path):
        readings.append(path)
        return [(len(readings),)]

    monkeypatch.setattr(container, "_state", other)
    with pytest.raises(lc.CheckpointError):
        lc.load(path)
    assert len(readings) == 2 * container.READINGS


# A process that saves, and stops (SIGSTOP) before the k-th thing it does to the disk.
WRITER = """
import itertools, json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
import lipconvert as lc
from lipconvert.checkpoints.documents import Claim
NETS = [lc.load(path) for path in sys.argv[1:]]
def run(k, path, seed, embed):
    calls = itertools.count(1)
    def stopping(owner, name):
        real = getattr(owner, name)
        def called(*arguments, **options):
            if next(calls) == k:
                os.kill(os.getpid(), signal.SIGSTOP)
            return real(*arguments, **options)
        setattr(owner, name, called)
    for owner, name in ((os, "open"), (Path, "write_bytes"), (Path, "open"), (os, "fsync"), (os, "replace"), (os, "unlink")):
        stopping(owner, name)
    lc.save(NETS[seed], path, prove=False, embed=embed)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            run(*json.loads(line))
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(code)
    print(pid, flush=True)
    _, status = os.waitpid(pid, os.WUNTRACED)
    print("stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status), flush=True)
    if os.WIFSTOPPED(status):
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """Saves in another process: (its id, "stopped" or the status it ended with), and the status it ends with afterwards."""
    folder = tmp_path_factory.mktemp("nets")
    paths = []
    for seed in range(2):
        paths.append(str(folder / f"{seed}.safetensors"))
        lc.save(network(seed), paths[-1], prove=False)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, *paths], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def begin(k, path, seed, embed=False):
        writer.stdin.write(json.dumps([k, str(path), seed, embed]) + "\n")
        writer.stdin.flush()
        pid, state = int(writer.stdout.readline()), writer.stdout.readline().strip()
        return pid, state if state == "stopped" else int(state)

    def end(pid, sent):
        os.kill(pid, sent)
        return int(writer.stdout.readline())

    yield begin, end
    writer.stdin.close()
    writer.wait(20)
    writer.stdout.close()


def refusal(kind, seed, folder):
    """What a save is refused with, "" where it is not."""
    try:
        save(kind, seed, folder)
    except lc.InvalidParameterError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_stops_or_is_killed_at_any_step(kind, tmp_path, process, monkeypatch):
    """While it stands still others are refused, or have gone before it; once it is killed or ends they are not."""
    begin, end = process
    monkeypatch.setattr(files, "WAIT", 0.0)
    name, given = KINDS[kind]
    refused = 0
    for k in range(1, 60):
        for sent in (signal.SIGKILL, signal.SIGCONT)[: 1 + k % 2]:  # every kill, and every other stop
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
            save("pair", 0, tmp_path)
            pid, state = begin(k, tmp_path / name, 1, bool(given))
            if state != "stopped":
                assert state == 0
                break
            found = refusal(kind, 2, tmp_path)
            if found:
                refused += 1
                assert str(tmp_path / name.split(".")[0]) in found
                assert "another process or thread has been writing it" in found
            held = seed_of(tmp_path / name)  # what is read while it stands still is whole
            assert held in (0, 1, 2)
            assert end(pid, sent) == (-signal.SIGKILL if sent == signal.SIGKILL else 0)
            found = seed_of(tmp_path / name)
            assert found == 1 if sent == signal.SIGCONT else found in (held, 1)
            save(kind, 3, tmp_path)  # nobody is blocked, and what a kill has left is cleared away
            assert seed_of(tmp_path / name) == 3
            assert [n for n in names(tmp_path) if n not in (GRAPH, DATA)] == []
        else:
            continue
        break
    assert state == 0
    assert refused > 3


def test_the_folder_that_may_not_be_written_to_is_read(tmp_path, monkeypatch):
    """With what a kill has left in it, and without the right to make a lock there."""
    save("pair", 1, tmp_path)
    content = (tmp_path / DATA).read_bytes()
    save("data alone", 0, tmp_path)
    files.partial_of(tmp_path / DATA).write_bytes(content)

    def closed(path):
        raise PermissionError(errno.EACCES, "no", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "_lock", closed)
        before = names(tmp_path)
        assert seed_of(tmp_path / GRAPH) == 1
        assert names(tmp_path) == before
    assert seed_of(tmp_path / GRAPH) == 1
    assert names(tmp_path) == [GRAPH, DATA]
    assert (tmp_path / DATA).read_bytes() == content


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_refused_and_can_be_read(number, tmp_path, monkeypatch):
    save("pair", 0, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def none(descriptor, *, blocking):
        raise OSError(number, "not here")

    opened = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    with monkeypatch.context() as patch:
        patch.setattr(files, "lock_descriptor", none)
        for kind in KINDS:
            with pytest.raises(OSError, match="its file system has no locks") as caught:
                save(kind, 1, tmp_path)
            assert caught.value.errno == number
            assert "write to another folder" in str(caught.value)
        with pytest.raises(OSError, match="no locks"), files.alone(tmp_path):
            raise AssertionError
        assert seed_of(tmp_path / GRAPH) == 0
        files.partial_of(tmp_path / DATA).write_bytes(before[DATA])
        save_over = before[DATA][:-8]
        (tmp_path / DATA).write_bytes(save_over)
        assert isinstance(lc.verify(tmp_path / GRAPH).passed, bool)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()}[GRAPH] == before[GRAPH]
    if opened is not None:
        assert len(os.listdir("/proc/self/fd")) == opened


def test_a_lock_that_lies_there_or_was_removed_meanwhile(tmp_path, monkeypatch):
    """The empty file of a killed process is no lock, and a lock on a file that has lost its name is none either."""
    lock = tmp_path / (DATA + files.LOCK)
    lock.write_bytes(b"")
    save("data alone", 0, tmp_path)
    assert names(tmp_path) == [DATA]
    # the holder removes it between our opening and our locking: what is locked is another file by then
    real, times = files.lock_descriptor, []

    def removed(descriptor, *, blocking):
        times.append(descriptor)
        if len(times) == 1:
            lock.unlink()
        return real(descriptor, blocking=blocking)

    monkeypatch.setattr(files, "lock_descriptor", removed)
    with files.only_writer(tmp_path / DATA, 0.0):
        assert len(times) == 2
        assert lock.is_file()
        with pytest.raises(lc.InvalidParameterError), files.only_writer(tmp_path / DATA, 0.0):
            raise AssertionError
    assert not lock.exists()


def test_a_name_that_leads_elsewhere_is_no_lock(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / (DATA + files.LOCK)).symlink_to(elsewhere)
    with pytest.raises(OSError, match="lock"):
        save("data alone", 0, tmp_path)
    assert not elsewhere.exists()


def test_data_alone_over_what_a_kill_has_left_of_a_pair(tmp_path, monkeypatch):
    """A save that fails leaves what was there: also where the data of the graph are not in their place yet."""
    save("pair", 1, tmp_path)
    content = (tmp_path / DATA).read_bytes()
    save("data alone", 0, tmp_path)
    files.partial_of(tmp_path / DATA).write_bytes(content)

    def full(path, tensors, manifest):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr("lipconvert.checkpoints.checkpoint.write_data", full)
        for kind in ("data alone", "pair"):
            with pytest.raises(OSError, match="no space"):
                save(kind, 2, tmp_path)
            assert seed_of(tmp_path / GRAPH) == 1


def hubbed(folder, seed):
    hub.write_folder(network(seed), folder)


def properties(folder, seed):
    net = network(seed)
    x = torch.rand(3, *net.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        labels = net(x).argmax(1)
    interchange.export_vnnlib(net, folder, list(zip(x, labels.tolist(), strict=True)), 0.1)


@pytest.mark.parametrize("write", [hubbed, properties])
def test_a_folder_of_files_that_belong_together_is_written_by_one(write, tmp_path, monkeypatch):
    """The second is refused, at whatever step the first is, and the folder is the first one's."""
    monkeypatch.setattr(files, "WAIT", 0.0)
    write(tmp_path / "alone", 1)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    folder = tmp_path / "both"
    folder.mkdir()
    real, seen = os.replace, []

    def replace(source, target):
        seen.append(target)
        if threading.current_thread() is threading.main_thread() and len(seen) < 20:
            with pytest.raises(lc.InvalidParameterError, match="another process is running in it"):
                write(folder, 2)
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        write(folder, 1)
    assert len(seen) > 2
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found.keys() == expected.keys()
    assert found == expected


@pytest.mark.parametrize(
    "write",
    [
        lambda path, text: _written(path, text),
        lambda path, text: Claim(claim=text, where="w", passed=True, found="f").write(path),
    ],
    ids=["whole", "document"],
)
def test_other_files_too(write, tmp_path, monkeypatch, waits):
    """Reports, tables, figures and states all go through `whole`: the second waits, and both were whole."""
    path, texts = tmp_path / "report.json", ["a" * 10_000, "b" * 20_000]
    expected = []
    for text in texts:
        write(tmp_path / "expected", text)
        expected.append((tmp_path / "expected").read_bytes())
    (tmp_path / "expected").unlink()
    for k in range(1, 30):
        waits.clear()
        with (
            ThreadPoolExecutor(1) as pool,
            monkeypatch.context() as patch,
            Stopped(patch, k, functools.partial(write, path, texts[0])) as one,
        ):
            stopped = one.stopped
            two = pool.submit(write, path, texts[1])
            while not two.done() and not waits.is_set():
                wait([two], 0.002)
            if not two.done() and path.exists():
                assert path.read_bytes() in expected
        two.result(60)
        assert path.read_bytes() in expected
        assert names(tmp_path) == ["report.json"]
        if not stopped:
            break
    assert not stopped


def _written(path, text):
    with files.whole(path) as partial:
        partial.write_text(text)
