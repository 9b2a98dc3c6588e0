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
    about_data = commands.add_parser("data", help="check a data set (mfef data verify --help)")
    actions = about_data.add_subparsers(dest="action", metavar="ACTION", required=True)
    verify = actions.add_parser("verify", help="counts, hashes, sizes, classes, unreadable files")
    verify.add_argument("--dataset", required=True, metavar="NAME")
    verify.add_argument("--data-dir", type=Path, metavar="DIR", help="the folder that holds it")
    commands.add_parser("doctor", help="what was built, what would run here, and why")
    options = parser.parse_args(argv)
    if options.command == "show":
        from .train.__main__ import show as show_run

        return show_run(options.path)
    if options.command == "data":
        from .train.__main__ import verify as verify_data

        return verify_data(options.dataset, options.data_dir)
    from .inspection import doctor

    print(doctor())
    return 0


if __name__ == "__main__":
    sys.exit(main())
