"""scripts/gpu_check.sh, as far as it can be judged without a GPU."""

import re
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.sh"
BACKENDS = 2  # with kernels for a GPU


def test_limits_fit_into_the_time():
    text = SCRIPT.read_text()
    whole, between = (
        int(re.search(rf"^{name}=(\d+)", text, re.MULTILINE)[1])
        for name in ("SECONDS_IN_ALL", "SECONDS_BETWEEN")
    )
    parts = re.findall(r"^ *(?:part|sanitize) (\S+) (\d+)\b", text, re.MULTILINE)
    assert len(parts) == len(re.findall(r"^ *(?:part|sanitize) [^(]", text, re.MULTILINE)) - 1
    taken = sum(int(limit) * (BACKENDS if "$backend" in name else 1) for name, limit in parts)
    assert taken <= whole - between
    # A benchmark has time to start and to write what it found.
    timed = re.findall(r"^ *part \S+ (\d+) (?:.*\\\n)?.*--seconds (\d+)", text, re.MULTILINE)
    assert len(timed) == 2 and all(int(limit) - int(given) >= 15 for limit, given in timed)


PARTS = """
SECONDS_IN_ALL=60 SECONDS_BETWEEN=0 begin=$SECONDS
out=$1 parts=$1/parts.tsv
part quick 4 true
part longer 1 sleep 2
part endless 1 sleep 60
part last 1 true
"""


def test_parts_leave_their_time_to_the_next(tmp_path):
    """And a part that has used up what there was takes nothing from those after it."""
    functions = re.search(r"^spare=0.*?^}\n", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)[0]
    command = ["bash", "-c", functions + PARTS, "bash", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    lines = (tmp_path / "parts.tsv").read_text().splitlines()
    said = dict(line.split("\t")[:2] for line in lines)
    assert said.pop("endless").startswith("failed: not done after ")
    assert said == {"quick": "passed", "longer": "passed", "last": "passed"}
