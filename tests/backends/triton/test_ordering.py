"""The order of memory in compiled code, which no interpreter and no single thread can show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
COMPILE = """
import sys
from mfef_ext.backends.triton import aot

name, channels = sys.argv[1:]
one = next(
    o
    for o in aot.launches()
    if o.name == name and channels in ("any", str(o.configuration["BLOCK_C"]))
)
print(aot.compile_for(one, 90).asm["ptx"])
"""


def memory(kernel, channels="any"):
    """The instructions of a kernel, in the tile of so many channels, on sm_90 that wait, or read or
    write global memory."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, kernel, channels]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert ran.returncode == 0, ran.stderr
    return re.findall(r"(bar\.sync|atom\.[\w.]+|(?:ld|st)\.global[\w.]*)", ran.stdout)


@pytest.mark.slow
def test_last_program_of_an_image_sees_what_the_others_stored():
    found = memory("spatial_backward_kernel")
    (at,) = [i for i, what in enumerate(found) if what.startswith("atom")]
    assert found[at] == "atom.global.gpu.acq_rel.add.u32"
    before, after = found[:at], found[at + 1 :]
    assert before[-1] == "bar.sync" and any(what.startswith("st.global") for what in before)
    assert after[0] == "bar.sync"
    assert next(what for what in after if what.startswith("ld")).startswith("ld.global.cg")
    assert not [what for what in found if ".nc" in what]


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "sections"), [("forward", 5), ("backward", 8)])
def test_threads_of_an_image_wait_for_each_other(direction, sections):
    """Between any two sections that store there is a barrier."""
    found = memory(f"image_{direction}_kernel", "32")
    assert not [what for what in found if ".nc" in what]
    runs = "".join("b" if w == "bar.sync" else w[0] for w in found)
    # A load that follows a store without a barrier between them would read another thread's place.
    stores = [part for part in runs.split("b") if "s" in part]
    assert len(stores) >= sections
