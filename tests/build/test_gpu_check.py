"""scripts/gpu_check.sh, as far as it can be judged without a GPU."""

import re
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
