"""What is in an image file, and which files below a folder are images: every kind of picture that
Pillow opens, read right or refused; every real file once, whatever lies beside it."""

import io
import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mfef_ext import cli
from mfef_ext.train import DataError, checkpoint, data
from mfef_ext.train.__main__ import main
from mfef_ext.train.data import Source, files

GREY = np.arange(256, dtype=np.uint16).reshape(16, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def read(*paths, side=16):
    """The pixels (N, 3, side, side), and the source that collected problems and facts."""
    source = Source(paths[0].parent, collect=True)
    return files.read_images(source, paths, side, "replace it").numpy(), source


def shown(path, side=16):
    """The pixels (side, side, 3) of a file that is whole."""
    pixels, source = read(path, side=side)
    assert source.problems == []
    return pixels[0].transpose(1, 2, 0)


def refused(path, *words):
    """The path is one problem, in one line, and the file after it is read all the same."""
    good = path.with_name("good.png")
    Image.fromarray(COLOURS).save(good)
    pixels, source = read(path, good)
    [problem] = source.problems
    assert problem.startswith(f"{path} cannot be read as an image (") and "replace it" in problem
    assert len(problem.splitlines()) == 1 and all(word in problem for word in words), problem
    assert (pixels[1].transpose(1, 2, 0) == COLOURS).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2", "big-endian.tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name):
    values = GREY * 257  # 0 to 65535
    Image.fromarray(values.astype(">u2" if name.startswith("big") else "<u2")).save(tmp_path / name)
    assert (shown(tmp_path / name) == GREY[..., None]).all()


def test_sixteen_bits_are_rounded_to_the_nearest(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    values[0, :4] = (128, 129, 385, 386)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.rint(values / 257).astype(int)
    assert expected[0, :4].tolist() == [0, 1, 1, 2]
    assert (shown(tmp_path / "a.png")[..., 0] == expected).all()


@pytest.mark.parametrize("largest", [1, 15, 255, 1023, 4095, 65535])
def test_grey_of_any_largest_value_is_scaled(tmp_path, largest):
    kind = ">u2" if largest > 255 else "u1"
    values = np.rint(GREY / 255 * largest)
    head = f"P5\n16 16\n{largest}\n".encode()
    (tmp_path / "a.pgm").write_bytes(head + values.astype(kind).tobytes())
    found = shown(tmp_path / "a.pgm")[..., 0].astype(float)
    assert abs(found - values / largest * 255).max() <= 1
    assert found.min() == 0 and found.max() == 255


def test_sixteen_bit_tiff_of_which_zero_is_white(tmp_path):
    values = (GREY * 257).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == 0 and image.mode.startswith("I;16")
        stored = np.asarray(image).astype(int)
    expected = 255 - np.rint(stored / 257).astype(int)
    assert (shown(tmp_path / "a.tif")[..., 0] == expected).all()


def chunk(name, content):
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_png_of_every_kind(tmp_path, kind, channels):
    values = np.repeat((GREY * 257).astype(">u2")[..., None], channels, axis=2)
    if kind in (4, 6):
        values[..., -1] = 65535
    lines = b"".join(b"\0" + line.tobytes() for line in values)
    head = struct.pack(">IIBBBBB", 16, 16, 16, kind, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines))
    (tmp_path / "a.png").write_bytes(png + chunk(b"IEND", b""))
    assert (shown(tmp_path / "a.png") == GREY[..., None]).all()


@pytest.mark.parametrize("name", ["i.tif", "f.tif", "f.pfm"])
def test_numbers_without_a_white_are_refused(tmp_path, name):
    kind = np.int32 if name == "i.tif" else np.float32
    Image.fromarray(GREY.astype(kind) * 257).save(tmp_path / name)
    refused(tmp_path / name, "integers of 32 bits" if name == "i.tif" else "floating-point")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes_of_eight_bits_and_less_look_alike(tmp_path, mode):
    level = 255 if mode == "1" else 200
    Image.new("L", (16, 16), level).convert(mode).save(tmp_path / "a.tif")
    assert (shown(tmp_path / "a.tif") == level).all()


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour", "gif"])
def test_what_is_transparent_is_white(tmp_path, kind):
    path, options = tmp_path / ("a.gif" if kind == "gif" else "a.png"), {}
    picture = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 8, 16))
    if kind == "LA":
        picture = picture.convert("LA")
    elif kind == "palette":
        picture = picture.quantize()
    elif kind == "colour":  # one of the colours stands for none
        picture, options = Image.new("RGB", (16, 16), "red"), {"transparency": (255, 0, 0)}
        picture.paste((0, 0, 0), (0, 0, 8, 16))
    picture.save(path, **options)
    found = shown(path)
    assert (found[:, :8] == 0).all() and (found[:, 8:] == 255).all()


def test_what_is_half_transparent_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 100, 200, 51)).save(tmp_path / "a.png")
    assert abs(shown(tmp_path / "a.png")[0, 0] - np.array([204.0, 224, 244])).max() <= 1


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.tif", "a.webp"])
def test_of_several_frames_the_first_is_read_and_verify_says_so(tmp_path, name):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    pixels, source = read(tmp_path / name)
    assert abs(pixels[0].mean((1, 2)) - (255, 0, 0)).max() <= 1
    [said] = [fact for fact in source.facts if "first frame" in fact]
    assert str(tmp_path / name) in said


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_pictures_are_turned_as_their_exif_says(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = np.kron(COLOURS[:4, :4], np.ones((4, 4, 1), np.uint8))
    Image.fromarray(blocks).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as file:
        expected = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    assert (shown(tmp_path / name) == expected).all()


def exif_of(*entries):
    """EXIF of entries (tag, type, count, value), written as they are."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    head = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    return head + body + b"\0\0\0\0"


SIX = (0x112, 3, 1, b"\x06\0")
EXIF = {  # whether the picture is turned, and what its EXIF is
    "resolution as text": (True, exif_of(SIX, (0x11A, 2, 3, b"72\0"))),
    "points past the end": (True, exif_of(SIX, (0x8769, 4, 1, b"\xff\xff\xff\x7f"))),
    "no such orientation": (False, exif_of((0x112, 3, 1, b"\x09\0"))),
    "orientation as text": (False, exif_of((0x112, 2, 2, b"6\0"))),
    "orientation of 2^31": (False, exif_of((0x112, 3, 2**31 - 1, b"\x06\0"))),
    "cut short": (False, b"Exif\0\0II*\0"),
    "far away": (False, b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "noise": (False, b"Exif\0\0" + bytes(range(7, 207))),
}


@pytest.mark.parametrize("case", EXIF)
def test_exif_that_cannot_be_read_is_ignored(tmp_path, case):
    turned, exif = EXIF[case]
    corner = np.zeros((16, 16, 3), np.uint8)
    corner[:4, :4] = 255
    Image.fromarray(corner).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    found = shown(tmp_path / "a.jpg")
    assert (found[:4, -4:] > 200).all() == turned and (found[:4, :4] > 200).all() != turned


def test_damaged_files_are_problems_each(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, "PNG")
    whole = buffer.getvalue()
    contents = {"empty": b"", "half": whole[: len(whole) // 2], "text": b"no picture"}
    for name, content in contents.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        refused(tmp_path / f"{name}.png")


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, IndexError, AssertionError, KeyError])
def test_any_exception_of_a_decoder_is_that_files_problem(tmp_path, monkeypatch, error):
    class Odd:
        def __enter__(self):
            raise error("first line\nsecond line")

        def __exit__(self, *arguments):
            pass

    opened = files._open
    monkeypatch.setattr(files, "_open", lambda p: Odd() if p.name == "odd.png" else opened(p))
    refused(tmp_path / "odd.png", "first line")


@pytest.mark.parametrize("limit", [100, 200])  # where Pillow refuses, and where it warns
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, recwarn, limit):
    Image.fromarray(COLOURS).save(tmp_path / "bomb.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    source = Source(tmp_path, collect=True)
    paths = [tmp_path / "bomb.png", tmp_path / "small.png"]
    files.read_images(source, paths, 9, "replace it")
    [problem] = source.problems
    assert "bomb.png" in problem and "decompression bomb" in problem
    assert len(recwarn) == 0


def picture(path, seed=None, **options):
    """A picture of its own at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = [ord(c) for c in f"{path.parent.name}/{path.name}"] if seed is None else seed
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    """A cat and a dog folder with ten pictures each."""
    root = tmp_path / "photos"
    for name in ("cat", "dog"):
        for i in range(10):
            picture(root / "train" / name / f"{i}.png")
    return root


def load(root, validation=0.0):
    return data.load("folder", validation, root, image_size=16)


def rows(images):
    return [x.numpy().tobytes() for x in images.pixels]


def everything(dataset):
    found = [row for split in data.SPLITS for row in rows(getattr(dataset, split))]
    return sorted(found)


def passed_over(root):
    """What verify says that it passed over, after it found the set whole."""
    facts, problems = data.verify("folder", root)
    assert problems == []
    return "\n".join(fact for fact in facts if fact.startswith("passed over"))


def test_what_the_system_leaves_behind_is_passed_over(photos, capsys):
    before = load(photos)
    assert before.remarks == ()
    train = photos / "train"
    shutil.copytree(train / "cat", train / ".ipynb_checkpoints")
    shutil.copytree(train / "cat", train / "cat" / ".ipynb_checkpoints")
    shutil.copytree(train / "dog", train / "dog" / "@eaDir")
    shutil.copytree(train / "dog", photos / "__MACOSX" / "dog")
    shutil.copy(train / "cat" / "0.png", train / "cat" / "._0.png")
    (train / "cat" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))
    (train / ".DS_Store").write_bytes(bytes(9))
    (train / "notes.txt").write_text("beside the classes")
    after = load(photos)
    assert after.classes == ("cat", "dog") and everything(after) == everything(before)
    assert rows(after.test) == rows(before.test)
    [remark] = after.remarks
    assert "passed over 8 files or folders" in remark and "mfef data verify" in remark
    said = passed_over(photos)
    for name in (".ipynb_checkpoints", "__MACOSX", "Thumbs.db", "notes.txt"):
        assert name in said


def test_every_real_file_counts_once(photos):
    before = load(photos)
    cat, dog = photos / "train" / "cat", photos / "train" / "dog"
    (cat / "loop").symlink_to("..")
    (cat / "root").symlink_to("/")
    (cat / "neighbours").symlink_to("../dog")
    (dog / "self").symlink_to("self")
    (dog / "a.png").symlink_to("0.png")  # sorted before the rest
    os.link(dog / "1.png", dog / "b.png")
    os.link(cat / "1.png", dog / "c.png")
    after = load(photos)
    assert everything(after) == everything(before)
    counts = torch.bincount(torch.cat([after.train.y, after.test.y])).tolist()
    assert counts == [10, 10]
    said = passed_over(photos)
    assert "links to folders" in said and "other names of files" in said


def test_of_two_ways_to_a_folder_its_own_place_counts(photos):
    """Whatever the names: links in two classes lead to a folder that lies in one of them."""
    for i in range(3):
        picture(photos / "train" / "dog" / "more" / f"{i}.png")
    before = load(photos)
    (photos / "train" / "cat" / "a").symlink_to("../dog/more")
    (photos / "train" / "cat" / "z").symlink_to("../dog/more")
    (photos / "train" / "dog" / "a").symlink_to("more")
    (photos / "train" / "dog" / "z").symlink_to("more")
    after = load(photos)
    assert data.fingerprint(after) == data.fingerprint(before)


def test_a_test_set_of_links_to_training_images_is_none(photos):
    shutil.copytree(photos / "train", photos / "test", copy_function=os.link)
    with pytest.raises(DataError, match="test has 0 images of cat"):
        load(photos)
    shutil.rmtree(photos / "test")
    (photos / "test").symlink_to("train")
    with pytest.raises(DataError, match="test has 0 images of cat"):
        load(photos)


def test_images_elsewhere_may_be_linked(photos, tmp_path):
    before = load(photos)
    (photos / "train" / "cat").rename(tmp_path / "cats")
    (photos / "train" / "cat").symlink_to(tmp_path / "cats")
    for path in (photos / "train" / "dog").iterdir():
        target = tmp_path / "store" / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        path.symlink_to(target)
    after = load(photos)
    assert rows(after.train) == rows(before.train) and rows(after.test) == rows(before.test)
    target.unlink()
    with pytest.raises(DataError, match=r"cannot be read as an image \(.*No such file"):
        load(photos)


def test_only_regular_files_are_opened(photos):
    """A pipe that nobody writes into would wait for ever."""
    before = load(photos)
    os.mkfifo(photos / "train" / "cat" / "pipe.jpg")
    os.mkfifo(photos / "train" / "cat" / "pipe")
    (photos / "train" / "cat" / "null.png").symlink_to("/dev/zero")
    assert everything(load(photos)) == everything(before)
    assert "neither files nor folders: 3" in passed_over(photos)


@pytest.mark.parametrize("name", ["x.jfif", "x.gif", "x.JPG", "x", "x.0", "x.tga", "x.ico"])
def test_what_pillow_opens_counts_whatever_its_suffix(photos, name):
    kinds = {"x.gif": "GIF", "x.tga": "TGA", "x.ico": "ICO"}
    picture(photos / "train" / "cat" / name, format=kinds.get(name, "JPEG"))
    dataset = load(photos)
    assert len(dataset.train) + len(dataset.test) == 21 and dataset.remarks == ()


def test_what_pillow_does_not_open_is_listed(photos):
    (photos / "train" / "cat" / "film.mp4").write_bytes(bytes(range(256)))
    (photos / "train" / "cat" / "drawing.svg").write_text("<svg/>")
    (photos / "train" / "cat" / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    (photos / "train" / "cat" / "raw.npy").write_bytes(bytes(2) + b"\x02" + bytes(400))
    assert len(load(photos).remarks) == 1
    assert "no images that Pillow opens: 4" in passed_over(photos)
    for i in range(500):
        (photos / "train" / "dog" / f"{i}.txt").write_text("x")
    said = passed_over(photos)
    assert "no images that Pillow opens: 504" in said and len(said) < 1000
    assert "--all names all" in said
    facts, _ = data.verify("folder", photos, every=True)
    names = "\n".join(facts).splitlines()
    assert all(f"  {photos}/train/dog/{i}.txt" in names for i in range(500))


def test_verify_goes_on_to_the_end(photos, capsys):
    for i in (1, 5):
        (photos / "train" / "cat" / f"{i}.png").write_bytes(b"")
    Image.fromarray(GREY.astype(np.int32)).save(photos / "train" / "dog" / "z.tif")
    command = ["data", "verify", "--dataset", "folder", "--data-dir", str(photos)]
    assert cli.main(command) == 3
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 3 and "folder: 3 problems" in captured.out


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_folder_with_validation_images(photos, name):
    for i in range(3):
        for kind in ("cat", "dog"):
            picture(photos / name / kind / f"{i}.png")
    dataset = load(photos, 0.1)
    assert [len(getattr(dataset, split)) for split in data.SPLITS] == [16, 6, 4]
    assert dataset.own_validation and len(load(photos, 0).validation) == 0
    shutil.copytree(photos / name, photos / "test")
    assert [len(getattr(load(photos, 0.1), split)) for split in data.SPLITS] == [20, 6, 6]
    shutil.copytree(photos / name, photos / {"val": "valid"}.get(name, "val"))
    with pytest.raises(DataError, match="leave one of these folders"):
        load(photos, 0.1)


def test_folders_beside_the_splits_are_listed(photos):
    picture(photos / "unlabelled" / "0.png")
    assert "beside train, val and test: 1" in passed_over(photos)


def test_the_right_level_is_the_remedy(photos, tmp_path):
    for wrong in (photos / "train", photos / "train" / "cat", photos.parent):
        with pytest.raises(DataError) as error:
            load(wrong)
        assert str(error.value).endswith(f"use --data-dir {photos}")
    with pytest.raises(DataError, match="is no folder; expected are folders ROOT/train/CLASS"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_names_that_are_no_utf8_train_draw_and_export(tmp_path, encoding, capsys):
    root = tmp_path / "photos"
    for i in range(6):
        picture(root / "train" / "dog" / f"{i}.png")
    name = os.fsencode(root / "train") + b"/" + "Löwe\n$x_".encode(encoding)
    os.mkdir(name)
    for path in (root / "train" / "dog").iterdir():
        other = np.asarray(Image.open(path))[::-1]
        with open(name + "/ß".encode(encoding) + os.fsencode(path.name), "wb") as file:
            Image.fromarray(other).save(file, "PNG")
    shown = "Löwe\\n$x_" if encoding == "utf-8" else "L\\xf6we\\n$x_"
    assert load(root).classes == (shown, "dog")
    out = tmp_path / "run"
    options = ["--dataset", "folder", "--data-dir", str(root), "--image-size", "16"]
    options += ["--epochs", "1", "--threads", "1", "--batch-size", "4", "--validation", "0"]
    assert main([*options, "--students", "resnet8", "--method", "mfef", "--out", str(out)]) == 0
    assert (out / "gates.png").exists()
    for command in ("eval", "plot", "export"):
        assert cli.main([command, str(out)]) == 0
    argv = ["--format", "torch-export", "--out", str(tmp_path / "net.pt2")]
    assert cli.main(["export", str(out), *argv]) == 0
    about = json.loads((out / "export" / "student0.json").read_text(encoding="utf-8"))
    assert about["classes"] == [shown, "dog"]
    assert checkpoint.load(out / "last.ckpt")["data"]["classes"] == [shown, "dog"]
    assert cli.main(["data", "verify", "--dataset", "folder", "--data-dir", str(root)]) == 0
    assert f"2 classes: {shown}, dog" in capsys.readouterr().out
