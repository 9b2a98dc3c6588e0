"""Processes of their own for tests, forked from a server that has imported what trainings need.

An interpreter of its own takes five seconds of a core to import PyTorch, its optimisers and the
trainer; a fork of one that has done so takes none. Of a child's environment only what is read
while these are being imported is the server's.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch._dynamo", "torchvision", "mfef_ext.train.__main__"])


class Child:
    """``python *arguments``, where these begin with -m, -c or a script, and pipes to it as text.

    ``arguments``, ``env`` and ``cwd`` are those of ``subprocess.Popen``.
    """

    def __init__(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        pipes = [os.pipe() for _ in range(3)]
        (stdin, to), (out, stdout), (err, stderr) = pipes
        ends = [_End(fd) for fd in (stdin, stdout, stderr)]
        what = (dict(os.environ if env is None else env), str(cwd or Path.cwd()), arguments)
        self._process = _SERVER.Process(target=_become, args=(ends, *what))
        self._process.start()
        for fd in (stdin, stdout, stderr):
            os.close(fd)
        self.stdin = os.fdopen(to, "w")
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, -N after signal N, or None if it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 600) -> tuple[str, str]:
        """Closes its standard input and returns all that it has printed, when it has ended.

        AssertionError after ``timeout`` seconds, and it is killed. What it prints has to fit into
        the pipes: 64 KiB each.
        """
        self.stdin.close()
        self._process.join(timeout)
        ended = self.returncode is not None
        self._process.kill()
        printed = self.stdout.read(), self.stderr.read()
        self.stdout.close()
        self.stderr.close()
        assert ended, f"no end within {timeout} s; it said {printed}"
        return printed

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        for pipe in (self.stdin, self.stdout, self.stderr):
            pipe.close()


class _End:
    """One end of a pipe on its way into a child; to be pickled while that is started."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[object, ...]:
        return _End.received, (reduction.DupFd(self.fd),)

    @staticmethod
    def received(duplicate: object) -> _End:
        return _End(duplicate.detach())  # type: ignore[attr-defined]


def _become(
    ends: Sequence[_End], env: Mapping[str, str], cwd: str, arguments: Sequence[str]
) -> None:
    for number, end in enumerate(ends):
        os.dup2(end.fd, number)
        os.close(end.fd)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(0),
        os.fdopen(1, "w"),
        os.fdopen(2, "w", buffering=1),
    )
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    kind, *rest = arguments
    if kind == "-m":
        name, *rest = rest
        sys.argv = [name, *rest]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="runpy")  # it was imported by the server
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")
