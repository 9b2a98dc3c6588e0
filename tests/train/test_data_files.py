"""Data sets in files: tiny ones in the real formats, read, and refused in every state of decay."""

import hashlib
import pickle
import shutil
import tarfile
import types
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from mfef_ext import cli
from mfef_ext.train import DataError, UsageError, data
from mfef_ext.train.__main__ import main
from mfef_ext.train.data import cifar, cinic, folder

RNG = np.random.default_rng(0)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content, protocol=2))


class Cifar:
    """A CIFAR of a few images: ``pixels`` and ``labels`` by split, in the authors' format."""

    def __init__(self, name, root, monkeypatch):
        self.name, self.root = name, root
        self.loader = {
            "cifar10": torchvision.datasets.CIFAR10,
            "cifar100": torchvision.datasets.CIFAR100,
        }[name]
        self.classes = 10 if name == "cifar10" else 100
        self.monkeypatch = monkeypatch
        self.folder = root / self.loader.base_folder
        self.archive = root / self.loader.filename
        counts = {"train": 10 if name == "cifar10" else 2, "test": 1}
        kind = replace(cifar.KINDS[name], per_class=counts)
        monkeypatch.setitem(cifar.KINDS, name, kind)
        self.labels = {
            split: RNG.permutation(np.repeat(np.arange(self.classes), n)).tolist()
            for split, n in counts.items()
        }
        self.pixels = {
            split: RNG.integers(0, 256, (len(y), 3072), np.uint8)
            for split, y in self.labels.items()
        }
        self.write()

    def write(self):
        """Writes all files and the archive, and makes their hashes the published ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        key = "labels" if self.name == "cifar10" else "fine_labels"
        lists = {"train": self.loader.train_list, "test": self.loader.test_list}
        for split, files in lists.items():
            hashed = []
            indices = np.array_split(np.arange(len(self.labels[split])), len(files))
            for (file, _), part in zip(files, indices, strict=True):
                labels = [self.labels[split][i] for i in part]
                content = {"data": self.pixels[split][part], key: labels}
                write_pickle(self.folder / file, content)
                hashed.append([file, md5(self.folder / file)])
            self.monkeypatch.setattr(self.loader, f"{split}_list", hashed)
        names = [f"class {c}" for c in range(self.classes)]
        meta = dict(self.loader.meta)
        write_pickle(self.folder / meta["filename"], {meta["key"]: names})
        meta["md5"] = md5(self.folder / meta["filename"])
        self.monkeypatch.setattr(self.loader, "meta", meta)
        with tarfile.open(self.archive, "w:gz") as tar:
            tar.add(self.folder, self.loader.base_folder)
        self.monkeypatch.setattr(self.loader, "tgz_md5", md5(self.archive))

    def mirror(self, server):
        """Empties the root; the archive is to be downloaded from ``server``."""
        shutil.move(self.archive, server.folder)
        shutil.rmtree(self.folder)
        self.monkeypatch.setattr(self.loader, "url", f"{server.url}/{self.archive.name}")
        return server.folder / self.archive.name


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine: ``url`` shows the files in ``folder``."""
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "mirror"
    folder.mkdir()
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_address[1]}"
        yield types.SimpleNamespace(url=url, folder=folder)
        running.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(params=["cifar10", "cifar100"])
def tiny(request, tmp_path, monkeypatch):
    return Cifar(request.param, tmp_path / "data", monkeypatch)


def load(tiny, **options):
    return data.load(tiny.name, 0.0, tiny.root, **options)


def one_sentence(error, *words):
    """The message of a DataError: one line, with what was expected and where to get it."""
    text = str(error.value)
    assert len(text.splitlines()) == 1 and all(str(word) in text for word in words), text


def test_cifar_is_read_as_bytes_and_normalised_as_published(tiny):
    dataset = load(tiny)
    assert dataset.shape == (3, 32, 32) and len(dataset.validation) == 0
    for split in ("train", "test"):
        images = getattr(dataset, split)
        assert images.pixels.dtype == torch.uint8 and images.y.tolist() == tiny.labels[split]
        expected = torch.from_numpy(tiny.pixels[split]).view(-1, 3, 32, 32)
        assert torch.equal(images.pixels, expected)
    mean, std = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }[tiny.name]
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(mean, std)]
    )
    image = tiny.pixels["test"][3].reshape(3, 32, 32).transpose(1, 2, 0)
    torch.testing.assert_close(dataset.test[3:4][0][0], transform(Image.fromarray(image)))
    assert dataset.augmentation == data.Augmentation(4, flip=True, border="constant")


def test_the_published_hashes_and_counts_are_torchvisions():
    kinds = {"cifar10": (5000, 1000, 10), "cifar100": (500, 100, 100)}
    for name, (train, test, classes) in kinds.items():
        assert cifar.KINDS[name].per_class == {"train": train, "test": test}
        assert (train * classes, test * classes) == (50000, 10000)
        assert getattr(torchvision.datasets, cifar.KINDS[name].loader).__name__.lower() == name


def test_validation_is_taken_from_train(tiny):
    dataset = data.load(tiny.name, 0.5, tiny.root)
    assert len(dataset.validation) == len(dataset.train) == len(tiny.labels["train"]) // 2


def test_a_file_that_may_not_be_read(tiny, monkeypatch):
    def refuse(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    # Permissions mean nothing to root, which tests often run as.
    monkeypatch.setattr("torchvision.datasets.utils.calculate_md5", refuse)
    with pytest.raises(DataError) as error:
        load(tiny)
    one_sentence(error, tiny.folder, "cannot be read (Permission denied)")


def test_a_missing_folder_and_file(tiny):
    file = tiny.folder / tiny.loader.train_list[0][0]
    file.unlink()
    tiny.archive.unlink()
    with pytest.raises(DataError) as error:
        load(tiny)
    one_sentence(error, file, "is missing", tiny.loader.url, cifar.PAGE, "--download")
    shutil.rmtree(tiny.root)
    with pytest.raises(DataError) as error:
        load(tiny)
    one_sentence(error, file, "is missing")
    assert not tiny.root.exists()  # nothing is downloaded unless asked


# What is given in place of the folder sets/data that the data set is in, and what is found there.
LEVELS = {
    "below": (
        "sets/data/cifar-10-batches-py",
        "holds batches.meta, data_batch_1, data_batch_2, ...;",
    ),
    "above": ("sets", "holds data;"),
    "two above": ("", "holds sets;"),
    "a file beside": ("sets/data/readme", "is a file;"),
    "a file inside": ("sets/data/cifar-10-batches-py/test_batch", "is a file;"),
}


@pytest.mark.parametrize("level", LEVELS)
def test_the_right_level_is_the_remedy(level, tmp_path, monkeypatch):
    """And nothing is downloaded for the second time."""
    tiny = Cifar("cifar10", tmp_path / "sets" / "data", monkeypatch)
    (tiny.root / "readme").touch()
    files = sorted(tmp_path.rglob("*"))
    wrong, found = LEVELS[level]
    for download in (False, True):
        with pytest.raises(DataError) as error:
            data.load("cifar10", 0.0, tmp_path / wrong, download=download)
        words = f"expected is a folder with {tiny.loader.base_folder}/batches.meta: use"
        one_sentence(error, f"--data-dir={tmp_path / wrong} {found} {words}")
        assert str(error.value).endswith(f"use --data-dir {tiny.root}")
    assert sorted(tmp_path.rglob("*")) == files


def nest(folder):
    """As some programs unpack an archive: into a folder of the name of the one that is in it."""
    aside = folder.rename(folder.with_name("aside"))
    folder.mkdir()
    aside.rename(folder / folder.name)


def nested_is_said(name, root, right):
    for download in (False, True):
        with pytest.raises(DataError) as error:
            data.load(name, 0.0, root, download=download)
        one_sentence(error, f"--data-dir={root} holds ")
        assert str(error.value).endswith(f": use --data-dir {right}")
    assert len(data.load(name, 0.0, right).train)


def test_cifar_nested_twice(tiny):
    nest(tiny.folder)
    nested_is_said(tiny.name, tiny.root, tiny.folder)


def test_cinic_nested_twice(tiny_cinic):
    root = tiny_cinic.rename(tiny_cinic.with_name("CINIC-10"))
    nest(root)
    nested_is_said("cinic10", root.parent, root)


def test_a_folder_nested_twice(photos):
    nest(photos / "train")
    nested_is_said("folder", photos, photos / "train")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "cinic10", "folder"])
def test_a_file_in_place_of_a_folder(name, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError) as error:
        data.load(name, 0.0, tmp_path / "file")
    one_sentence(error, f"--data-dir={tmp_path}/file is a file; expected is a folder with ")
    assert "download" not in str(error.value)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_files_are_named(tiny, damage):
    file, expected = tiny.loader.test_list[0]
    path = tiny.folder / file
    whole = bytearray(path.read_bytes())
    if damage == "flip":
        whole[len(whole) // 2] ^= 1
    path.write_bytes(whole if damage == "flip" else whole[:-9] if damage == "cut" else b"")
    with pytest.raises(DataError) as error:
        load(tiny)
    one_sentence(error, path, "its MD5 is", f"expected {expected}", cifar.PAGE)
    load(tiny, download=True)  # from the archive that is there
    assert md5(path) == expected


def test_an_archive_that_is_not_unpacked_or_cut_short(tiny):
    shutil.rmtree(tiny.folder)
    with pytest.raises(DataError) as error:
        load(tiny)
    one_sentence(error, "is missing", f"unpack {tiny.archive}")
    tiny.archive.write_bytes(tiny.archive.read_bytes()[:-20])
    with pytest.raises(DataError) as error:
        load(tiny)
    one_sentence(error, f"{tiny.archive} (", "cut short", tiny.loader.tgz_md5, cifar.PAGE)


@pytest.mark.parametrize("label", [-1, 100])
def test_labels_out_of_range_are_refused(tiny, label):
    tiny.labels["train"][5] = label
    tiny.write()
    with pytest.raises(DataError) as error:
        load(tiny)
    one_sentence(error, f"the label {label}, expected 0 to {tiny.classes - 1}", cifar.PAGE)


def test_wrong_counts_are_refused(tiny):
    tiny.labels["test"][0] = tiny.labels["test"][1]
    tiny.write()
    with pytest.raises(DataError) as error:
        load(tiny)
    one_sentence(error, "the test part", "images of class", "expected 1")
    tiny.labels["test"].pop()
    tiny.write()
    with pytest.raises(DataError):
        load(tiny)


def test_something_else_with_the_right_hash_is_refused(tiny, monkeypatch):
    file = tiny.loader.test_list[0][0]
    write_pickle(tiny.folder / file, {"pictures": 1})
    monkeypatch.setattr(tiny.loader, "test_list", [[file, md5(tiny.folder / file)]])
    with pytest.raises(DataError) as error:
        load(tiny)
    one_sentence(error, "the test part", "is not in the format")


def test_download_fetches_checks_and_unpacks(tiny, server):
    published = tiny.mirror(server)
    with pytest.raises(DataError):
        load(tiny)
    dataset = load(tiny, download=True)
    assert dataset.train.y.tolist() == tiny.labels["train"]
    published.unlink()
    assert len(load(tiny, download=True).test) == len(dataset.test)  # all there: nothing fetched


def test_a_download_that_is_cut_short_or_fails(tiny, server):
    published = tiny.mirror(server)
    published.write_bytes(published.read_bytes()[:-20])
    with pytest.raises(DataError) as error:
        load(tiny, download=True)
    one_sentence(error, tiny.archive, "could not be had from", tiny.loader.tgz_md5, cifar.PAGE)
    assert not tiny.folder.exists()
    tiny.archive.unlink()
    published.unlink()
    with pytest.raises(DataError) as error:
        load(tiny, download=True)
    one_sentence(error, "could not be had from")


def test_verify_says_what_is_there_and_every_problem(tiny, capsys):
    command = ["data", "verify", "--dataset", tiny.name, "--data-dir", str(tiny.root)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    for word in (
        tiny.loader.tgz_md5,
        f"{tiny.archive.stat().st_size} bytes",
        f"{tiny.classes} classes: class 0, ",
        f"train: {len(tiny.labels['train'])} images of 3x32x32",
        f"{tiny.name}: whole",
    ):
        assert word in out
    (tiny.folder / tiny.loader.meta["filename"]).unlink()
    (tiny.folder / tiny.loader.test_list[0][0]).write_bytes(b"")
    assert cli.main(command) == 3
    captured = capsys.readouterr()
    assert f"{tiny.name}: 2 problems" in captured.out and len(captured.err.splitlines()) == 2


@pytest.mark.parametrize("tiny", ["cifar10"], indirect=True)
def test_train_on_cifar_and_refuse_without(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--dataset", "cifar10", "--epochs", "1", "--batch-size", "50", "--threads", "1"]
    options += ["--out", str(out), "--data-dir"]
    assert main([*options, str(tmp_path / "nowhere")]) == 3
    error = capsys.readouterr().err
    assert error.startswith("mfef: ") and len(error.splitlines()) == 1
    assert not out.exists()
    assert main([*options, str(tiny.root)]) == 0
    assert (out / "student1.safetensors").exists() and (out / "gates.png").exists()


def write_images(where, n, size=(32, 32), mode="RGB"):
    where.mkdir(parents=True)
    for i in range(n):
        pixels = RNG.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(where / f"{i}.png")


@pytest.fixture
def tiny_cinic(tmp_path, monkeypatch):
    monkeypatch.setattr(cinic, "PER_CLASS", 2)
    for split in ("train", "valid", "test"):
        for name in cinic.CLASSES:
            write_images(tmp_path / "data" / split / name, 2)
    uniform = data.Normalisation((0.5,) * 3, (0.289,) * 3, 255)  # of evenly drawn bytes
    monkeypatch.setattr(cinic, "NORMALISATION", uniform)
    return tmp_path / "data"


def test_cinic_as_published():
    assert cinic.PER_CLASS * len(cinic.CLASSES) == 90_000
    assert cinic.NORMALISATION.mean == (0.47889522, 0.47227842, 0.43047404)
    assert cinic.NORMALISATION.std == (0.24205776, 0.23828046, 0.25874835)


def test_cinic_is_read_with_its_own_validation_images(tiny_cinic, tmp_path):
    dataset = data.load("cinic10", 0.1, tiny_cinic)
    assert [len(getattr(dataset, s)) for s in ("train", "validation", "test")] == [20, 20, 20]
    assert len(data.load("cinic10", 0, tiny_cinic).validation) == 0
    few = data.load("cinic10", 0.1, tiny_cinic, labels_per_class=1)
    assert [len(getattr(few, s)) for s in ("train", "validation", "test")] == [10, 20, 20]
    for split, folder_name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        for label in (0, 9):
            image = Image.open(tiny_cinic / folder_name / cinic.CLASSES[label] / "1.png")
            expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            images = getattr(dataset, split)
            assert images.y[2 * label + 1] == label
            assert torch.equal(images.pixels[2 * label + 1], expected)
    (tmp_path / "parent").mkdir()
    tiny_cinic.rename(tmp_path / "parent" / "CINIC-10")  # as the archive is unpacked here
    assert torch.equal(data.load("cinic10", 0, tmp_path / "parent").train.y, dataset.train.y)


def test_cinic_one_level_off(tiny_cinic):
    for wrong in (tiny_cinic / "train", tiny_cinic / "test" / "cat", tiny_cinic.parent):
        with pytest.raises(DataError) as error:
            data.load("cinic10", 0.1, wrong)
        one_sentence(error, f"use --data-dir {tiny_cinic}")


def test_cinic_with_what_the_system_leaves_behind(tiny_cinic):
    before = data.load("cinic10", 0.1, tiny_cinic)
    shutil.copytree(tiny_cinic / "train" / "cat", tiny_cinic / "train" / ".ipynb_checkpoints")
    shutil.copy(tiny_cinic / "test" / "cat" / "0.png", tiny_cinic / "test" / "cat" / "._0.png")
    after = data.load("cinic10", 0.1, tiny_cinic)
    assert data.fingerprint(after) == data.fingerprint(before) and len(after.remarks) == 1


def test_cinic_in_decay(tiny_cinic, capsys):
    def refused(*words):
        with pytest.raises(DataError) as error:
            data.load("cinic10", 0.1, tiny_cinic)
        one_sentence(error, cinic.ARCHIVE.page, *words)

    first = tiny_cinic / "test" / "cat" / "0.png"
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    refused(first, "cannot be read as an image")
    first.write_text("not a picture")
    refused(first, "cannot be read as an image")
    other = tiny_cinic / "valid" / "dog" / "1.png"
    Image.new("RGB", (31, 32)).save(other)
    refused(other, "31x32 pixels, expected 32x32")
    command = ["data", "verify", "--dataset", "cinic10", "--data-dir", str(tiny_cinic)]
    assert cli.main(command) == 3
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2 and str(first) in err and str(other) in err
    first.unlink()
    refused(tiny_cinic / "valid" / "dog")  # read before test
    other.unlink()
    refused(tiny_cinic / "valid", "has 1 images of dog, expected 2")
    shutil.rmtree(tiny_cinic / "valid")
    refused(tiny_cinic / "valid", "is missing", "get https://datashare.ed.ac.uk")


def test_cinic_of_other_images_or_classes(tiny_cinic, monkeypatch):
    monkeypatch.setattr(cinic, "NORMALISATION", data.Normalisation((0.5,) * 3, (0.25,) * 3, 255))
    with pytest.raises(DataError, match=r"standard deviation of the pixels 0.2.* other images"):
        data.load("cinic10", 0.1, tiny_cinic)
    write_images(tiny_cinic / "train" / "zebra", 1)
    with pytest.raises(DataError, match="zebra is no class of CINIC-10"):
        data.load("cinic10", 0.1, tiny_cinic)


def test_cinic_is_downloaded_and_a_cut_archive_refused(
    tiny_cinic, server, tmp_path, monkeypatch, capsys
):
    published = server.folder / "any.tar.gz"
    with tarfile.open(published, "w:gz") as tar:
        for split in ("train", "valid", "test"):
            tar.add(tiny_cinic / split, split)
    archive = replace(cinic.ARCHIVE, url=f"{server.url}/any.tar.gz", md5=md5(published))
    monkeypatch.setattr(cinic, "ARCHIVE", archive)
    there = tmp_path / "there"
    dataset = data.load("cinic10", 0.1, there, download=True)
    assert torch.equal(dataset.train.pixels, data.load("cinic10", 0.1, tiny_cinic).train.pixels)
    kept = there / archive.name
    kept.write_bytes(kept.read_bytes()[:-20])
    assert cli.main(["data", "verify", "--dataset", "cinic10", "--data-dir", str(there)]) == 3
    assert f"{kept} (" in capsys.readouterr().err
    shutil.rmtree(there / "CINIC-10")
    with pytest.raises(DataError, match="cut short"):
        data.load("cinic10", 0.1, there)


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    write_images(root / "train" / "cat", 6, (40, 30))
    write_images(root / "train" / "dog", 5, (16, 20), "L")
    write_images(root / "train" / "owl", 5, (9, 9), "RGBA")
    (root / "train" / "cat" / "notes.txt").write_text("no image by its name")
    return root


def test_a_folder_gives_a_fifth_of_every_class_to_the_test(photos):
    dataset = data.load("folder", 0, photos, image_size=16)
    assert dataset.classes == ("cat", "dog", "owl") and dataset.shape == (3, 16, 16)
    assert torch.bincount(dataset.train.y).tolist() == [5, 4, 4]
    assert torch.bincount(dataset.test.y).tolist() == [1, 1, 1]
    assert dataset.train.pixels.dtype == torch.uint8
    x = dataset.train.x
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    again = data.load("folder", 0, photos, image_size=16)
    assert torch.equal(again.test.pixels, dataset.test.pixels)
    assert data.load("folder", 0, photos).shape == (3, 32, 32)


def test_a_folder_with_a_test_set(photos):
    for name in ("cat", "dog", "owl"):
        write_images(photos / "test" / name, 2, (16, 16))
    dataset = data.load("folder", 0, photos, image_size=16)
    assert len(dataset.train) == 16 and len(dataset.test) == 6
    image = np.array(Image.open(photos / "test" / "dog" / "0.png"))
    assert torch.equal(dataset.test.pixels[2], torch.from_numpy(image).permute(2, 0, 1))


def test_images_are_cut_around_the_middle(photos):
    shutil.rmtree(photos / "train" / "cat")
    wide = Image.new("RGB", (48, 16), "red")
    wide.paste("blue", (16, 0, 32, 16))
    (photos / "train" / "ant").mkdir()
    for i in range(3):
        wide.save(photos / "train" / "ant" / f"{i}.jpg", quality=100)
    images = data.load("folder", 0, photos, image_size=16).train
    assert (images.pixels[0].flatten(1).float().mean(1) - torch.tensor([0.0, 0, 255])).max() < 9


def test_a_folder_in_decay(photos, capsys):
    def refused(*words):
        with pytest.raises(DataError) as error:
            data.load("folder", 0, photos)
        one_sentence(error, *words)

    broken = photos / "train" / "dog" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    refused(broken, "cannot be read as an image", "replace or remove it")
    command = ["data", "verify", "--dataset", "folder", "--data-dir", str(photos)]
    assert cli.main(command) == 3
    captured = capsys.readouterr()
    assert str(broken) in captured.err and "9x9 to 40x30 pixels" in captured.out
    broken.unlink()
    assert cli.main(command) == 0
    (photos / "train" / "emu").mkdir()
    refused("has 0 images of emu, expected at least one", folder.LAYOUT)
    write_images(photos / "train" / "fox", 2)
    (photos / "train" / "emu").rmdir()
    refused("a fifth of", "has 0 images of fox", "make a test set")
    for name in ("cat", "dog", "fox"):
        write_images(photos / "test" / name, 1)
    refused("test and train differ in the class owl", folder.LAYOUT)
    shutil.rmtree(photos / "train")
    refused("train", "ROOT/train/CLASS")


def test_images_that_would_not_fit_are_refused(photos, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    with pytest.raises(UsageError, match="--image-size=32 makes 16 images"):
        data.load("folder", 0, photos)


def test_a_network_of_torchvision_trains_with_one_of_ours(photos, tmp_path):
    options = ["--dataset", "folder", "--data-dir", str(photos), "--epochs", "1", "--threads", "1"]
    options += ["--batch-size", "13", "--validation", "0", "--image-size", "64"]
    out = tmp_path / "run"
    students = ["--students", "torchvision:mobilenet_v3_small", "wrn-10-1"]
    assert main([*options, *students, "--out", str(out)]) == 0
    from mfef_ext.train import checkpoint

    for i in (0, 1):
        net, about = checkpoint.load_student(out / f"student{i}.safetensors")
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
        assert len(about["mean"]) == len(about["std"]) == 3 and about["scale"] == 255
    assert about["build"]["tap"] == "final"


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_verify_of_what_is_bundled(name, capsys):
    assert cli.main(["data", "verify", "--dataset", name]) == 0
    assert f"{name}: whole" in capsys.readouterr().out
