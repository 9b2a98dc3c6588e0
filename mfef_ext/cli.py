"""The ``mfef`` command: finds the subcommand and hands over. Nothing is imported before needed."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``mfef`` with ``argv`` (the process's own by default); returns the exit status.

    130: interrupted before there was anything to keep. 1: standard output was closed or full.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a folder's name need not be in the encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("mfef: interrupted; nothing was left half done", file=sys.stderr)
        return 130
    except OSError as error:
        # What is still buffered goes nowhere, so that the exit does not complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"mfef: the output could not be written ({error.strerror})", file=sys.stderr)
        return 1
    return status


def _run(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["train"]:  # its options, and their help, are tyro's
        from .train.__main__ import main as train

        return train(argv[1:])
    parser = argparse.ArgumentParser(
        prog="mfef", description="Multi-scale feature extraction and fusion, kernels and trainer."
    )
    parser.add_argument("--version", action="version", version=f"mfef {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("train", help="train students together (mfef train --help)")
    show = commands.add_parser("show", help="check a run's checkpoint and say what it holds")
    show.add_argument("path", type=Path, help="a run folder or a .ckpt file")
    evaluate = commands.add_parser("eval", help="score a run's checkpoint on the test images again")
    export = commands.add_parser("export", help="one student, without any part of MFEF")
    plot = commands.add_parser("plot", help="curves, confusion, diversity, t-SNE and gates as PNG")
    for command in (evaluate, export, plot):
        command.add_argument("path", type=Path, metavar="RUN", help="a run folder")
        command.add_argument("--checkpoint", choices=("last", "previous", "best"), default="last")
        command.add_argument("--device", help="where to compute; where it was trained by default")
        command.add_argument(
            "--data-dir", type=Path, metavar="DIR", help="where the run's data are, if they moved"
        )
    evaluate.add_argument(
        "--student", type=Path, metavar="FILE", help="score this .safetensors file instead"
    )
    export.add_argument("--student", type=int, default=0, metavar="I", help="0 is the first")
    export.add_argument(
        "--ema", action="store_true", help="its averaged weights; default: those of the last step"
    )
    export.add_argument(
        "--format", choices=("safetensors", "torch-export", "onnx"), default="safetensors"
    )
    export.add_argument("--out", type=Path, metavar="FILE", help="default: in RUN/export")
    table = commands.add_parser("table", help="runs side by side, in Markdown")
    table.add_argument(
        "paths", type=Path, metavar="RUN", nargs="+", help="run folders, or folders of these"
    )
    about_data = commands.add_parser("data", help="check a data set (mfef data verify --help)")
    actions = about_data.add_subparsers(dest="action", metavar="ACTION", required=True)
    verify = actions.add_parser("verify", help="counts, hashes, sizes, classes, unreadable files")
    verify.add_argument("--dataset", required=True, metavar="NAME")
    verify.add_argument("--data-dir", type=Path, metavar="DIR", help="the folder that holds it")
    commands.add_parser("doctor", help="what was built, what would run here, and why")
    options = vars(parser.parse_args(argv))
    if options["command"] == "doctor":
        from .inspection import doctor, wrong_setting

        print(doctor())
        return 2 if wrong_setting() else 0
    if options["command"] == "data":
        from .train.__main__ import verify as verify_data

        return verify_data(options["dataset"], options["data_dir"])
    from .train.__main__ import look

    return look(**options)


if __name__ == "__main__":
    sys.exit(main())
