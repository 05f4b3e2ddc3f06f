"""Data sets: digits against scikit-learn's arrays, torchvision sets against tiny archives written by hand."""

import gzip
import hashlib
import io
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

import lipconvert as lc
from lipconvert import data


def write_idx(path, array):
    """The IDX format: two zero bytes, 0x08 for uint8, the number of dimensions, the big-endian sizes, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root, name, rng):
    written = {}
    for part, prefix, count in (("train", "train", 7), ("test", "t10k", 4)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        write_idx(root / name / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(root / name / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
        written[part] = images, labels
    return written


def write_batch(path, entry):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(entry, protocol=2))
    return [path.name, hashlib.md5(path.read_bytes()).hexdigest()]


def test_digits_are_those_of_scikit_learn_split_once():
    source = load_digits()
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    found = np.concatenate([part.tensors()[0].numpy().reshape(len(part), 64) for part in (train, test)])
    labels = np.concatenate([part.labels.numpy() for part in (train, test)])
    rows = np.column_stack([found * 16, labels])
    expected = np.column_stack([source.data, source.target])
    # Sixteenths are exact in float32: the same multiset of rows, none lost, none twice.
    assert np.array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])


def test_digits_split_is_stratified_and_the_same_every_time():
    whole = np.bincount(load_digits().target)
    test = data.load("digits", "test")
    assert np.abs(np.bincount(test.labels.numpy()) - whole * 360 / 1797).max() <= 1
    again = data.load("digits", "test")
    assert torch.equal(test.pixels, again.pixels)
    assert torch.equal(test.labels, again.labels)


def test_an_item_is_a_float_image_in_the_unit_interval_and_an_int():
    image, label = data.load("digits")[5]
    assert image.dtype is torch.float32
    assert image.shape == (1, 8, 8)
    assert 0.0 <= float(image.min()) <= float(image.max()) <= 1.0
    assert type(label) is int


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_idx_files(tmp_path, name, folder, split):
    images, labels = write_mnist(tmp_path, folder, np.random.default_rng(0))[split]
    found = data.load(name, split, tmp_path)
    assert len(found) == len(labels)
    for k in range(len(labels)):
        image, label = found[k]
        assert image.shape == (1, 28, 28)
        # one float32 division
        np.testing.assert_allclose(image[0].numpy(), images[k] / 255, rtol=1e-7, atol=0)
        assert label == labels[k]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_batches(tmp_path, monkeypatch, name, split):
    rng = np.random.default_rng(1)
    ten = name == "cifar10"
    folder = tmp_path / ("cifar-10-batches-py" if ten else "cifar-100-python")
    key, classes = ("labels", 10) if ten else ("fine_labels", 100)
    names = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
    if not ten:
        names = {"train": ["train"], "test": ["test"]}
    images, labels, lists = {}, {}, {}
    for part, files in names.items():
        images[part] = rng.integers(0, 256, (len(files), 3, 3, 32, 32), dtype=np.uint8)  # 3 images a file
        labels[part] = rng.integers(0, classes, (len(files), 3)).tolist()
        lists[part] = [
            write_batch(folder / file, {"data": images[part][k].reshape(3, 3072), key: labels[part][k]})
            for k, file in enumerate(files)
        ]
    meta_file, meta_key = ("batches.meta", "label_names") if ten else ("meta", "fine_label_names")
    meta = write_batch(folder / meta_file, {meta_key: [str(k) for k in range(classes)]})
    kind = datasets.CIFAR10 if ten else datasets.CIFAR100
    # torchvision compares checksums with those of the published archives.
    monkeypatch.setattr(kind, "train_list", lists["train"])
    monkeypatch.setattr(kind, "test_list", lists["test"])
    monkeypatch.setattr(kind, "meta", {"filename": meta[0], "key": meta_key, "md5": meta[1]})
    found = data.load(name, split, tmp_path)
    expected = images[split].reshape(-1, 3, 32, 32)
    assert found.shape == (3, 32, 32)
    x, y = found.tensors()
    np.testing.assert_allclose(x.numpy(), expected / 255, rtol=1e-7, atol=0)
    assert y.tolist() == [label for file in labels[split] for label in file]


def test_a_changed_cifar_archive_is_refused_before_it_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"):
        (folder / file).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(lc.DataError, match="corrupted"):
        data.load("cifar10", "test", tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "t10k-images-idx3-ubyte"),
        ("fashion-mnist", "train-labels-idx1-ubyte"),
        ("cifar10", "data_batch_5"),
        ("cifar100", "meta"),
    ],
)
def test_missing_files_are_named_with_the_folder_and_the_way_to_get_them(tmp_path, name, file):
    with pytest.raises(lc.DataError) as caught:
        data.load(name, "test", tmp_path)
    message = str(caught.value)
    assert file in message
    assert str(tmp_path) in message
    assert "download=True" in message
    assert caught.value.name == name
    assert list(tmp_path.iterdir()) == []  # nothing was downloaded


def test_a_compressed_idx_file_does_not_count(tmp_path):
    write_mnist(tmp_path, "MNIST", np.random.default_rng(2))
    whole = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    whole.with_name(whole.name + ".gz").write_bytes(gzip.compress(whole.read_bytes()))
    whole.unlink()
    with pytest.raises(lc.DataError, match="t10k-images-idx3-ubyte not found"):
        data.load("mnist", "test", tmp_path)


@pytest.mark.parametrize(
    "damage", [b"", b"not an IDX file at all", bytes([0, 0, 8, 3]) + struct.pack(">3I", 4, 28, 28)]
)
def test_a_damaged_idx_file_is_named(tmp_path, damage):
    write_mnist(tmp_path, "MNIST", np.random.default_rng(3))
    (tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(damage)
    with pytest.raises(lc.DataError, match="cannot be read"):
        data.load("mnist", "test", tmp_path)


def test_images_without_labels_are_refused(tmp_path):
    write_mnist(tmp_path, "MNIST", np.random.default_rng(4))
    write_idx(tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", np.zeros(3))
    with pytest.raises(lc.DataError, match=r"\(4, 1, 28, 28\) and \(3,\)"):
        data.load("mnist", "test", tmp_path)


def png(pixels, mode=None):
    """(H, W) or (H, W, C) as the bytes of a PNG file, which is lossless."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    (image if mode is None else image.convert(mode)).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def pictures():
    return np.random.default_rng(5).integers(0, 256, (6, 4, 3, 3), dtype=np.uint8)  # (N, H, W, C)


def as_bytes(images):
    return [png(image) for image in images]


def as_structs(images):
    return [{"bytes": png(image), "path": f"{k}.png"} for k, image in enumerate(images)]


@pytest.mark.parametrize("packed", [as_bytes, as_structs])
@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "labels"), ("image", "fine_label")])
def test_a_parquet_file(tmp_path, pictures, packed, image, label):
    labels = [3, 0, 1, 1, 9, 0]
    write_table(tmp_path / "test.parquet", {image: packed(pictures), label: labels, "coarse_label": [0] * 6})
    write_table(tmp_path / "train.parquet", {image: packed(pictures[:1]), label: [7]})
    found = data.load(f"parquet:{tmp_path}", "test", "nowhere")
    assert found.pixels.dtype is torch.uint8
    assert np.array_equal(found.pixels.numpy(), pictures.transpose(0, 3, 1, 2))
    assert found.labels.tolist() == labels
    np.testing.assert_allclose(found[4][0].numpy(), pictures[4].transpose(2, 0, 1) / 255, rtol=1e-7, atol=0)
    assert data.load(f"parquet:{tmp_path}", "train").labels.tolist() == [7]


def test_parquet_shards_are_read_in_order_and_none_may_lack(tmp_path, pictures):
    parts = [f"test-0000{k}-of-00003-af.parquet" for k in range(3)]
    for k in (2, 0, 1):  # not as they are written
        write_table(tmp_path / parts[k], {"img": as_bytes(pictures[2 * k : 2 * k + 2]), "label": [2 * k, 2 * k + 1]})
    found = data.load(f"parquet:{tmp_path}")
    assert found.labels.tolist() == list(range(6))
    assert np.array_equal(found.pixels.numpy(), pictures.transpose(0, 3, 1, 2))
    (tmp_path / parts[1]).unlink()
    with pytest.raises(lc.DataError, match=r"says 3 files, but .* holds 2"):
        data.load(f"parquet:{tmp_path}")


def test_parquet_files_that_do_not_fit(tmp_path, pictures):
    images, name = as_bytes(pictures[:2]), f"parquet:{tmp_path}"

    def refused(match, **columns):
        write_table(tmp_path / "test.parquet", columns)
        with pytest.raises(lc.DataError, match=match) as caught:
            data.load(name)
        assert caught.value.name == name

    refused("one image column .* but it has none, of the columns picture, label", picture=images, label=[0, 1])
    refused("one label column .* but it has none", img=images, target=[0, 1])
    refused("but it has label, fine_label", img=images, label=[0, 1], fine_label=[0, 1])
    refused("but it has image, img", img=images, image=images, label=[0, 1])
    refused("column 'img' .* type string", img=["a.png", "b.png"], label=[0, 1])
    refused("column 'img' .* type struct<path", img=[{"path": "a.png"}] * 2, label=[0, 1])
    refused("row 1 of .* holds no image", img=[{"bytes": images[0]}, {"bytes": None}], label=[0, 1])
    refused("type double", img=images, label=[0.0, 1.0])
    refused("more than one label for an image", img=images, label=[[0, 1], [1]])
    refused("row 1 of .* has no label: None", img=images, label=[0, None])
    refused("row 0 of .* has no label: -1", img=images, label=[-1, 0])
    refused("row 1 of .*parquet is not an image that can be decoded", img=[images[0], b"no image"], label=[0, 1])
    refused("row 0 of .* is not an image that can be decoded", img=[images[0][:60], images[1]], label=[0, 1])
    refused("row 1 of .* has 4x4 pixels, but row 0 of .* has 3x4", img=[images[0], png(np.ones((4, 4)))], label=[0, 1])
    deep = io.BytesIO()
    Image.fromarray(np.ones((4, 3), dtype=np.uint16)).save(deep, "PNG")
    refused("mode I;16, but 8 bits", img=[deep.getvalue()], label=[0])
    write_table(tmp_path / "test.parquet", {"img": images[:0], "label": []})
    with pytest.raises(lc.DataError):
        data.load(name)
    (tmp_path / "test.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(lc.DataError, match="cannot be read"):
        data.load(name)
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(lc.DataError, match=r"neither test.parquet nor test-\*.parquet found"):
        data.load(name)


def test_parquet_without_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(lc.DataError, match=r"pip install 'lipconvert\[parquet\]'"):
        data.load(f"parquet:{tmp_path}")


def write_folder(root, images, classes):
    for k, (image, label) in enumerate(zip(images, classes, strict=True)):
        path = root / label / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_of_images(tmp_path, pictures, split):
    classes = ["wolf", "cat", "wolf", "owl", "cat", "cat"]
    write_folder(tmp_path / split, as_bytes(pictures), classes)
    (tmp_path / split / "owl" / "notes.txt").write_text("not an image")
    found = data.load(f"folder:{tmp_path}", split)
    order = [1, 4, 5, 3, 0, 2]  # by class, then by file
    assert found.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert np.array_equal(found.pixels.numpy(), pictures[order].transpose(0, 3, 1, 2))


def test_grey_images_have_one_channel_unless_some_are_coloured(tmp_path, pictures):
    grey = pictures[:2, :, :, 0]
    write_folder(tmp_path / "test", as_bytes(grey), ["a", "b"])
    assert np.array_equal(data.load(f"folder:{tmp_path}").pixels.numpy(), grey[:, None])
    write_folder(tmp_path / "test", [png(pictures[0]), png(pictures[1], "RGBA")], ["c", "d"])
    found = data.load(f"folder:{tmp_path}").pixels.numpy()
    assert np.array_equal(found[:2], np.repeat(grey[:, None], 3, 1))
    assert np.array_equal(found[2:], pictures[:2].transpose(0, 3, 1, 2))


def test_other_kinds_of_image_files(tmp_path, pictures):
    kinds = {"two": "1", "palette": "P"}
    for label, mode in kinds.items():
        buffer = io.BytesIO()
        image = Image.fromarray(pictures[0]).convert(mode)
        image.save(buffer, "PNG", **({"transparency": bytes([0, 128])} if mode == "P" else {}))
        write_folder(tmp_path / label / "test", [buffer.getvalue()], ["a"])
        found = data.load(f"folder:{tmp_path / label}").pixels
        expected = np.array(image.convert("L" if mode == "1" else "RGB")).reshape(4, 3, -1)
        assert np.array_equal(found[0].numpy(), expected.transpose(2, 0, 1))
    jpeg = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(jpeg, "JPEG", quality=95)
    (tmp_path / "jpeg" / "test" / "a").mkdir(parents=True)
    (tmp_path / "jpeg" / "test" / "a" / "0.jpg").write_bytes(jpeg.getvalue())
    found = data.load(f"folder:{tmp_path / 'jpeg'}").pixels.int()
    assert found.shape == (1, 3, 16, 16)
    assert int((found - 200).abs().max()) <= 2


def test_folders_that_do_not_fit(tmp_path, pictures):
    name = f"folder:{tmp_path}"
    with pytest.raises(lc.DataError, match=r"images are looked for in .*CLASS"):
        data.load(name)
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(lc.DataError, match=r"images are looked for in .*no valid file"):
        data.load(name)
    write_folder(tmp_path / "test", [png(pictures[0]), b"no image"], ["a", "b"])
    with pytest.raises(lc.DataError, match=r"b.1\.png is not an image that can be decoded"):
        data.load(name)
    write_folder(tmp_path / "test", [png(pictures[0]), png(pictures[1, :2])], ["a", "b"])
    with pytest.raises(lc.DataError, match=r"has 3x2 pixels, but .* has 3x4"):
        data.load(name)
    write_folder(tmp_path / "train", as_bytes(pictures[:3]), ["a", "b", "c"])
    for split in ("train", "test"):  # c would be 2 in one, and nothing in the other
        with pytest.raises(lc.DataError, match="c is in one of train, test only"):
            data.load(name, split)


def test_unknown_names_list_what_exists():
    with pytest.raises(lc.InvalidParameterError) as caught:
        data.load("imagenet")
    assert all(
        name in str(caught.value) for name in ("imagenet", "digits", "mnist", "fashion-mnist", "cifar10", "cifar100")
    )
    assert all(name in str(caught.value) for name in ("parquet:DIR", "folder:DIR"))
    for name in ("parquet:", "folder:", "digits:here", "zip:here"):
        with pytest.raises(lc.InvalidParameterError, match="parquet:DIR"):
            data.load(name)
    with pytest.raises(lc.InvalidParameterError, match="train, test"):
        data.load("folder:here", "validation")
    with pytest.raises(lc.InvalidParameterError, match="train, test"):
        data.load("digits", "validation")


def test_flat_networks_get_the_same_pixels():
    images, seen = data.load("digits"), []
    flat = data.Shaped(images, (64,), limit=3, seen=lambda: seen.append(1))
    assert [x.shape for x, _ in flat] == [(64,)] * 3
    for k in range(3):
        assert torch.equal(flat[k][0], images[k][0].flatten())
    assert len(seen) == 6  # three by the list, three by index
    with pytest.raises(lc.ShapeError, match="digits"):
        data.Shaped(images, (3, 32, 32))
    with pytest.raises(lc.InvalidParameterError, match="limit"):
        data.Shaped(images, (64,), limit=0)
