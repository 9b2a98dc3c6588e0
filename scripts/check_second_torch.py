"""Tests one wheel under other torches: built beside this environment's, run with 2.13.0.

Makes the wheel in dist/, a virtual environment .venv-torch213 with torch, numpy, ONNX and the test
tools and nothing else (so the layer is seen to need no training extras), installs the wheel there
and runs the tests of the operators, of torch.compile, export and ONNX from a folder in which the
source tree cannot be imported.

    .venv/bin/python scripts/check_second_torch.py [--torch 2.10.0 2.11.0 ...] [--delete] [--again]
                                                   [-- PYTEST OPTIONS]

2.13.0 is the one of which package indices have a small build for CPUs, 0.2 GB. Of other versions
the download is 3 GB and the environment 5 to 7 GB, which --delete removes afterwards.

Nothing is done twice: a wheel with the same contents and the same tests, once passed, is not run
again unless --again asks for it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDS = ("numpy", "pytest", "pytest-xdist", "hypothesis", "expecttest", "onnx", "onnxscript")
TESTS = ("tests/ops", "tests/test_modules.py", "tests/test_export.py")
# Of numbers alone, which the first torch has seen: nothing in it is another torch's business.
LEFT_OUT = "tests/ops/test_fft.py"

# Run by the second interpreter, so that what is tested is what is meant to be.
WHERE_FROM = """
import pathlib, sys, torch, mfef_ext
from mfef_ext import _C
source, wanted = sys.argv[1:]
found = pathlib.Path(mfef_ext.__file__).resolve()
if found.parent == pathlib.Path(source, "mfef_ext").resolve():
    sys.exit("check_second_torch: the source tree was imported in place of the wheel.")
if torch.__version__.split("+")[0] != wanted:
    sys.exit(f"check_second_torch: torch {torch.__version__} is there in place of {wanted}.")
print(f"mfef_ext {mfef_ext.__version__} with torch {torch.__version__}")
"""


def run(*command: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
    """Runs a command; ends the script with a sentence if the command fails."""
    words = [str(word) for word in command]
    status = subprocess.run(words, cwd=cwd, env=env).returncode
    if status != 0:
        sys.exit(f"check_second_torch: `{' '.join(words[:5])} ...` ended with status {status}.")


def build_wheel() -> Path:
    """The wheel, from the objects that the last build left but nothing else that it left."""
    for leftover in [*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")]:
        shutil.rmtree(leftover)
    for old in ROOT.glob("dist/mfef_ext-*.whl"):
        old.unlink()
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps")
    run(*pip, "--wheel-dir", ROOT / "dist", ROOT)
    (wheel,) = ROOT.glob("dist/mfef_ext-*.whl")
    return wheel


def make_environment(venv: Path, torch: str) -> None:
    """``venv``, with the versions of constraints.txt but for torch and what it depends on."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    others = [line for line in lines if not re.match(r"torch|triton|nvidia|cuda|setuptools", line)]
    content = "\n".join([*others, f"torch=={torch}", ""])
    installed = venv / "installed-with.txt"
    record = content + "# " + " ".join(NEEDS)
    if installed.exists() and installed.read_text() == record:
        return
    run(sys.executable, "-m", "venv", "--clear", venv)
    constraints = venv / "constraints.txt"
    constraints.write_text(content)
    pip = (venv / "bin" / "python", "-m", "pip", "install", "--quiet")
    run(*pip, "--constraint", constraints, "torch", *NEEDS)
    installed.write_text(record)


def digest(wheel: Path, venv: Path) -> str:
    """What decides whether a run would be a repetition: the files in the wheel and the tests."""
    found = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.infolist(), key=lambda member: member.filename):
            found.update(f"{member.filename} {member.CRC} {member.file_size}\n".encode())
    for path in sorted(test_files()):
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    found.update(Path(__file__).read_bytes())
    found.update((venv / "installed-with.txt").read_bytes())
    return found.hexdigest()


def test_files() -> list[Path]:
    """The operator tests, what they import from tests/, and pytest's settings."""
    shared = [path for path in ROOT.glob("tests/*.py") if not path.name.startswith("test_")]
    files = [ROOT / "pyproject.toml", *shared]
    for name in TESTS:
        path = ROOT / name
        if not path.exists():
            sys.exit(f"check_second_torch: {name} does not exist; TESTS in this script names it.")
        files += [path] if path.is_file() else path.rglob("*.py")
    return [path for path in files if path != ROOT / LEFT_OUT]


def check(wheel: Path, torch: str, again: bool, options: list[str]) -> None:
    """Runs the tests of the wheel with one version of torch, in an environment of its own."""
    venv = environment(torch)
    make_environment(venv, torch)
    passed = venv / "passed.txt"
    now = digest(wheel, venv)
    if not again and passed.exists() and passed.read_text() == now:
        print(f"{wheel.name} and its tests are those that passed with torch {torch} before.")
        return
    python = venv / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["OMP_NUM_THREADS"] = "1"  # as in `make test`: two processes with a thread each
    with tempfile.TemporaryDirectory(prefix="mfef-second-torch-") as folder:
        for path in test_files():
            copy = Path(folder, path.relative_to(ROOT))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        run(python, "-c", WHERE_FROM, ROOT, torch, cwd=Path(folder), env=env)
        pytest = (python, "-m", "pytest", "-p", "no:cacheprovider")
        spread = ("-n", "2", "--dist", "worksteal")
        run(*pytest, *spread, *TESTS, *options, cwd=Path(folder), env=env)
    if not options:  # a selection is not the whole
        passed.write_text(now)


def environment(torch: str) -> Path:
    """Where the virtual environment for a version of torch is."""
    return ROOT / f".venv-torch{''.join(torch.split('.')[:2])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--torch", nargs="+", default=["2.13.0"], help="versions, one after another"
    )
    parser.add_argument("--delete", action="store_true", help="remove environments after their use")
    parser.add_argument("--again", action="store_true", help="run tests that have passed already")
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    options = parser.parse_args()

    wheel = build_wheel()
    for torch in options.torch:
        try:
            check(wheel, torch, options.again, options.pytest)
        finally:
            if options.delete:
                shutil.rmtree(environment(torch), ignore_errors=True)


if __name__ == "__main__":
    main()
