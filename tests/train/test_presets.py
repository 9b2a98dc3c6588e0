"""Options by the name of a recipe and out of YAML files: what counts more, and what is refused."""

import json
from pathlib import Path

import pytest

from mfef_ext.train import UsageError
from mfef_ext.train.__main__ import main
from mfef_ext.train.config import TrainConfig
from mfef_ext.train.presets import PRESETS, configured, saved


def written(tmp_path, text):
    (tmp_path / "options.yaml").write_text(text)
    return ["--config", str(tmp_path / "options.yaml")]


def test_the_papers_recipe():
    config, rest = configured(["--preset", "okd-cifar", "--lr", "0.05"])
    assert rest == ["--lr", "0.05"]
    rates = [config.lr_at(epoch) for epoch in (149, 150, 224, 225)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert (config.epochs, config.batch_size, config.ramp_length) == (300, 128, 80)
    assert (config.momentum, config.weight_decay, config.seeds) == (0.9, 5e-4, (0, 1, 2))
    assert config.validation == 0 and config.labels_per_class is None  # on all 50,000 images
    for name, options in PRESETS.items():
        if options["dataset"] != "digits":
            options = options | {"data_dir": Path("x")}
        TrainConfig(**options).check()
        assert configured([f"--preset={name}"])[1] == []


def test_the_file_counts_more_than_the_preset(tmp_path):
    text = "epochs: 7\nlr-drops: [0.4, 1]\nweight_decay: 1e-4\nfusion: false\nema: 0.9\ntap: []\n"
    config, _ = configured([*written(tmp_path, text), "--preset", "okd-cifar"])
    assert (config.epochs, config.batch_size, config.fusion, config.ema) == (7, 128, False, 0.9)
    assert config.lr_drops == (0.4, 1.0) and config.weight_decay == 1e-4 and config.tap == ()
    assert isinstance(config.lr_drops[1], float)


def test_choices_and_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config, _ = configured(written(tmp_path, "amp: bf16\nresume: auto\nout: ~/runs\n"))
    assert (config.amp, config.resume, config.out) == ("bf16", "auto", Path("/home/me/runs"))
    assert configured(written(tmp_path, "amp: null"))[0].amp is None


def test_the_command_line_counts_most(tmp_path):
    options = ["--preset", "quick", *written(tmp_path, "epochs: 7\nmethod: ce\ndata_dir: null")]
    out = tmp_path / "run"
    assert main([*options, "--dataset", "fake", "--epochs", "1", "--out", str(out)]) == 0
    content = (out / "config.json").read_text()
    assert '"epochs": 1' in content and '"method": "ce"' in content


def test_without_validation_images_the_last_epoch_is_to_be_quoted(tmp_path, capsys):
    options = ["--dataset", "fake", "--method", "ce", "--epochs", "1", "--threads", "1"]
    for share, chosen, quoted in (("0", "test", "last"), ("0.1", "validation", "best")):
        out = tmp_path / share
        assert main([*options, "--validation", share, "--out", str(out)]) == 0
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["best_chosen_on"], summary["to_quote"]) == (chosen, quoted)
        said = " ".join(capsys.readouterr().out.split())
        assert ("chosen ON THE TEST SET" in said) is (quoted == "last")
        assert ("quote the last epoch" in said) is (quoted == "last")


# Nine lists of nine lists and so on, in a few lines: 3 GB of text if it is written out.
BOMB = (
    "tap: ["
    + "\n  , ".join(
        ["&a0 [x]"] + [f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    )
    + "]"
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epocs: 3", "epocs is unknown; did you mean epochs?"),
        ("epochs: many", "epochs=many is not a whole number"),
        ("epochs: 1.5", "epochs=1.5 is not a whole number"),
        ("epochs: true", "epochs=true is not a whole number"),
        ("lr: fast", "lr=fast is not a number"),
        ("lr: null", "lr=null is not a number"),
        ("fusion: 1", "fusion=1 is not true or false"),
        ("students: resnet8", "students=resnet8 is not a list such as \\[text, text\\]"),
        ("amp: fp8", "amp=fp8 is not one of bf16, fp16"),
        ("epochs: 1\nepochs: 2", "epochs is given twice; leave one out"),
        ("lr: 1" + "0" * 400, r"lr=1000+\.\.\. is not a number"),
        ("seed: 1" + "0" * 5000, "is no YAML: Exceeds the limit"),
        ("out: 2020-13-45", "is no YAML: month must be in 1..12"),
        ("out: " + "[" * 3000, "is no YAML: maximum recursion depth exceeded"),
        ("epochs: {a: 1}", "epochs={a: 1} is not a whole number"),
        ("epochs:\t3", "is no YAML: while scanning"),
        ("epochs: .inf", "epochs=.inf is not a whole number"),
        ("lr-drops: 0.1\nlr_drops: 0.2", "lr-drops=0.1 is not a list"),
        ("out: ~nosuchuser/x", "out=~nosuchuser/x is not the path of a file"),
        ('out: "~a\\0b"', "is not the path of a file or folder or null"),
        ("students: [[a, b]]", r"students=\[\[a, b\]\] is not a list such as \[text, text\]"),
        ("students:\n- resnet8\n- {a: 1}\nlr: 1", r"students=- resnet8 - {a: 1} is not a list"),
        ('students: ["resnet8", 3]', r'students=\["resnet8", 3\] is not a list'),
        (BOMB, r"tap=\[&a0 \[x\] , &a1 .{70,100}\.\.\. is not a list such as"),
        ("tap: " + "[" * 300 + "]" * 300, r"tap=\[{100}\.\.\. is not a list such as"),
        ("tap: &a [*a]", r"tap=&?a? ?\[\*a\] is not a list such as|is no YAML"),
        ("x" * 70000 + ": 1", "is longer than 65536 characters"),
        ("x" * 5000 + ": 1", "^.{0,500}$"),
        ("? [a, b]\n: 1", "a list is unknown"),
        ("- epochs", "holds no options"),
        ("", "holds no options"),
        ("a: [", "is no YAML"),
    ],
)
def test_refused(tmp_path, text, words):
    with pytest.raises(UsageError, match=words):
        configured(written(tmp_path, text))


def test_refused_by_the_command(tmp_path, capsys):
    for options, words in (
        (["--preset", "okd-cifr"], "--preset=okd-cifr is unknown; did you mean okd-cifar?"),
        (["--preset"], "--preset needs a value"),
        (["--config", str(tmp_path)], "cannot be read (Is a directory)"),
        (["--config", str(tmp_path / "none")], "cannot be read (No such file or directory)"),
        (written(tmp_path, "lr: -1"), "--lr=-1.0 must be positive"),
        (["--method", "x" * 5000], "--method=xxx"),
        (["--students", "x" * 5000], "--students=xxx"),
    ):
        assert main(options) == 2
        error = capsys.readouterr().err
        assert len(error) < 1500
        assert words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["~nosuchuser/x", "~root"])
def test_a_path_read_back_is_the_one_that_was_given(name):
    """The shell has expanded what it would; the rest is the name of a file."""
    config = saved(Path("last.ckpt"), {"config": {"out": name, "data_dir": name}})
    assert str(config.out) == str(config.data_dir) == name
