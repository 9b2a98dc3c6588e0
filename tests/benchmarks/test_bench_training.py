"""The benchmark of a training step: every backend is there, and the same step is what runs."""

import json
from types import SimpleNamespace

import bench_training
import torch


def test_rows_and_table(tmp_path, capsys):
    options = ["--students", "resnet8", "resnet8", "--image-size", "16", "--batch-size", "8"]
    status = bench_training.main(
        [*options, "--seconds", "1", "--threads", "1", "--out", str(tmp_path)]
    )
    assert status == 0
    result = json.loads((tmp_path / "training.json").read_text())
    rows = {row["backend"]: row for row in result["rows"]}
    assert list(rows) == ["cpu", "reference"]
    for row in rows.values():
        assert 0 < row["head_share"] < 1 and row["rounds"] >= 5
        step = row["seconds_per_step"]
        assert 0 < step["p20"] <= step["median"] <= step["p80"]
        assert row["images_per_second"] == 8 / step["median"]
    assert rows["reference"]["speedup_over_reference"]["median"] == 1
    assert "| cpu |" in capsys.readouterr().out


def test_backends_train_the_same_networks():
    options = SimpleNamespace(
        students=["resnet8"], image_size=16, batch_size=8, device="cpu", dtype="float32"
    )
    cpu, reference = (bench_training.Trainer(name, options) for name in ("cpu", "reference"))
    for trainer in (cpu, reference):
        trainer()
    for a, b in zip(cpu.distiller.parameters(), reference.distiller.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
