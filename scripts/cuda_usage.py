"""Says what the compiled CUDA kernels take: registers, spills and shared memory, per architecture.

    python scripts/cuda_usage.py

No GPU is needed, only cuobjdump: of the CUDA toolkit, or the one that Triton's package carries. The
exit status is 1 if a kernel spills registers, 2 if the library or cuobjdump is not there.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mfef_ext

HEAD = """\
{built}. A number in angle brackets is the width of a row in shared memory.
Registers and spilled bytes are a thread's. Shared memory is asked for by the launch, up to what
`explain` says; the {reserved} bytes that the code of sm_90 and later lists are the driver's own.
"""

Usage = tuple[int, int, int]  # registers, spilled bytes, bytes of static shared memory


def library() -> Path | None:
    """The installed _C_cuda, None if there is none."""
    path = Path(mfef_ext.__file__).with_name("_C_cuda.so")
    return path if path.exists() else None


def cuobjdump() -> str | None:
    """The program, from PATH, the usual CUDA folder or Triton's package."""
    places = [Path("/usr/local/cuda/bin")]
    triton = importlib.util.find_spec("triton")
    if triton and triton.submodule_search_locations:
        places.append(Path(triton.submodule_search_locations[0]) / "backends/nvidia/bin")
    found = (shutil.which("cuobjdump", path=str(place)) for place in places)
    return shutil.which("cuobjdump") or next(filter(None, found), None)


def parse(text: str) -> dict[str, dict[str, Usage]]:
    """{kernel: {architecture: usage}} from the output of ``cuobjdump -res-usage``."""
    usage: dict[str, dict[str, Usage]] = {}
    architecture = kernel = ""
    for line in text.splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.match(r" *Function (\S+):", line):
            # kernel<Name<row>, threads, blocks>(BlockArgs), mangled: names after their length
            mangled = re.search(r"kernelINS0_(\d+)(\w+)", found[1])
            if not mangled:
                raise RuntimeError(f"cuobjdump names a kernel of an unknown form: {found[1]}")
            length = int(mangled[1])
            row = re.match(r"ILi(\d+)EEE", mangled[2][length:])
            kernel = mangled[2][:length] + (f"<{row[1]}>" if row else "")
        elif found := re.match(r" *REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            usage.setdefault(kernel, {})[architecture] = (registers, stack + local, shared)
    return usage


def read(path: Path, program: str) -> dict[str, dict[str, Usage]]:
    """What the kernels of a library take. Raises RuntimeError if it cannot be read."""
    run = subprocess.run([program, "-res-usage", str(path)], capture_output=True, text=True)
    usage = parse(run.stdout)
    if run.returncode or not usage:
        raise RuntimeError(f"{program} could not read {path}: {run.stderr.strip()}")
    return usage


def spills(usage: dict[str, dict[str, Usage]]) -> list[str]:
    """A sentence for each kernel that spills."""
    return [
        f"{kernel} spills {spilled} bytes per thread on {architecture}."
        for kernel, of in usage.items()
        for architecture, (_, spilled, _) in of.items()
        if spilled
    ]


def table(usage: dict[str, dict[str, Usage]], built: str) -> str:
    """All kernels in Markdown."""
    architectures = list(dict.fromkeys(a for of in usage.values() for a in of))
    reserved = max(shared for of in usage.values() for _, _, shared in of.values())
    rows = [f"| kernel | registers ({', '.join(architectures)}) | spilled bytes | shared |"]
    rows.append("|---|---:|---:|---:|")

    def order(kernel: str) -> tuple[str, int]:
        name, _, row = kernel.partition("<")
        return name, int(row.rstrip(">") or 0)

    for kernel in sorted(usage, key=order):
        columns = zip(*(usage[kernel][a] for a in architectures), strict=True)
        cells = [" / ".join(map(str, column)) for column in columns]
        rows.append(f"| {' | '.join([kernel, *cells])} |")
    return HEAD.format(built=built, reserved=reserved) + "\n" + "\n".join(rows) + "\n"


def main() -> int:
    path, program = library(), cuobjdump()
    built = str(mfef_ext.build_info()["cuda"])
    if path is None or program is None:
        print(f"no _C_cuda ({built})" if path is None else "no cuobjdump", file=sys.stderr)
        return 2
    usage = read(path, program)
    print(table(usage, built), end="")
    for sentence in spills(usage):
        print(sentence, file=sys.stderr)
    return 1 if spills(usage) else 0


if __name__ == "__main__":
    sys.exit(main())
