"""The ``mfef`` command: finds the subcommand and hands over. Nothing is imported before needed."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from .signals import Terminated, sigterm_raises
from .version import __version__

OUTPUT, FAULT, TERMINATED, INTERRUPTED = 1, 70, 75, 130


class _Output:
    """A standard stream that a command outlives: after the first error, which is kept, what is
    written goes nowhere. A long training does not end because nobody reads its lines."""

    def __init__(self, stream: TextIO | None) -> None:
        self.error = None if stream is not None else "it is closed"
        self._stream = stream if stream is not None else io.StringIO()
        if isinstance(stream, io.TextIOWrapper):  # a folder's name need not be in the encoding
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return len(text) if self.error else self._stream.write(text)
        except (OSError, ValueError) as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            if not self.error:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.error = getattr(error, "strerror", None) or str(error)
        if isinstance(error, OSError):
            # What is still buffered goes nowhere, so that the exit does not complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``mfef`` with ``argv`` (the process's own by default); returns the exit status.

    130: interrupted before there was anything to keep. 75: stopped by SIGTERM. 70: a fault in this
    package. 1: standard output was closed or full; what was to be done is done all the same.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: else the next file would get the number, and what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    streams = sys.stdout, sys.stderr
    out, err = _Output(sys.stdout), _Output(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        with sigterm_raises(for_good=argv is None):
            status = _guarded(argv, out)
            out.flush()
            err.flush()
    finally:
        sys.stdout, sys.stderr = streams
    processes = sys.modules.get("mfef_ext.train.processes")
    if argv is None and processes is not None and processes.is_waiting():
        os._exit(status)  # what waits is a thread of C++, and not to meet the interpreter's end
    return status


def _guarded(argv: Sequence[str] | None, out: _Output) -> int:
    """The command's exit status, whatever ends it."""
    try:
        try:
            status = _run(argv)
        finally:
            out.flush()
    except SystemExit as exit:  # how option parsers leave
        if out.error is None or exit.code:
            raise
        status = 0
    except Terminated:
        print("mfef: stopped by SIGTERM; files already written are whole", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("mfef: interrupted; nothing was left half done", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        print("mfef: this is a fault of mfef_ext; report it with the lines above", file=sys.stderr)
        return FAULT
    if out.error is None:
        return status
    print(f"mfef: the output could not be written ({out.error})", file=sys.stderr)
    return status or OUTPUT


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
    show.add_argument("path", type=Path, metavar="RUN", help="a run folder or a .ckpt file")
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
    verify.add_argument("--all", action="store_true", help="name every file that is remarked on")
    commands.add_parser("doctor", help="what was built, what would run here, and why")
    options = vars(parser.parse_args(argv))
    if options["command"] == "doctor":
        from .inspection import doctor, wrong_setting

        print(doctor())
        return 2 if wrong_setting() else 0
    if options["command"] == "data":
        from .train.__main__ import verify as verify_data

        return verify_data(options["dataset"], options["data_dir"], options["all"])
    from .train.__main__ import look

    return look(**options)


if __name__ == "__main__":
    sys.exit(main())
