"""One short run that several files look at; nobody writes into its own files."""

import pytest

from mfef_ext.train.__main__ import main

# The digits need one epoch at this rate for students that are far from chance, and differ.
OPTIONS = ("--dataset", "digits", "--epochs", "3", "--threads", "1", "--lr", "0.05", "--seed", "3")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run with mfef on digits; its best epoch need not be its last."""
    path = tmp_path_factory.mktemp("trained") / "run"
    assert main([*OPTIONS, "--tensorboard", "--out", str(path)]) == 0
    return path
