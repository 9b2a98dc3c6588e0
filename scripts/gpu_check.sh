#!/usr/bin/env bash
# Everything that only a GPU can show, in nine minutes, without a network:
#
#     scripts/gpu_check.sh OUT
#
# builds the package with what is installed, runs the tests marked gpu, the benchmark for every
# backend that has kernels, and compute-sanitizer over a few tests. OUT gets summary.md, .json and
# .csv, a log of each part, and a folder of results.json and results.csv per backend.
#
# The parts come in the order of what they are worth; their limits, with two backends, add up to what
# there is, so that each has its time even if all that come before it use theirs up. What they leave
# of theirs goes to the next ones.
#
# A part that fails or runs out of time is shown and does not stop the rest. The exit status is 1 if
# one failed, 2 if nothing was run. PYTHON names the interpreter, python3 by default.
set -u

PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=540
SECONDS_BETWEEN=15 # of which no part has any: which backends there are, the summary
# Tests that reach every kernel, with strides, borders and sizes that are odd; all names are matched.
SANITIZED="sanitized or any_strides or empty_batch"
# Where tests marked gpu are; the trainer's tests need packages that a GPU machine may lack.
GPU_TESTS=(tests/backends tests/ops tests/test_backends.py tests/test_modules.py)

begin=$SECONDS
if [ $# -ne 1 ] || [ -z "$1" ]; then
  echo "usage: scripts/gpu_check.sh OUT" >&2
  exit 2
fi
if ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
  echo "gpu_check: $PYTHON has no torch that sees a CUDA device, so there is nothing to check here." >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd) || exit 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -e "$out/summary.json" ]; then
  echo "gpu_check: $out holds the summary of another run; name another folder." >&2
  exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
parts=$work/parts.tsv # name, status, seconds, limit
: > "$parts"

spare=0 # seconds that parts had and did not use

# part NAME LIMIT COMMAND...: runs it for at most LIMIT and the spare seconds, or what is left of the
# whole.
part() {
  local name=$1 limit=$(($2 + spare)) since=$SECONDS status said
  local left=$((SECONDS_IN_ALL - SECONDS_BETWEEN - (SECONDS - begin)))
  shift 2
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  echo "== $name"
  if [ "$limit" -le 0 ]; then
    said="not run: the time was used up"
  else
    timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
    status=$?
    case $status in
      0) said=passed ;;
      124 | 137) said="failed: not done after $limit s" ;;
      *) said="failed: exit status $status" ;;
    esac
    tail -n "$([ "$said" = passed ] && echo 3 || echo 40)" "$out/$name.log"
  fi
  echo "-- $name $said"
  printf '%s\t%s\t%s\t%s\n' "$name" "$said" $((SECONDS - since)) "$limit" >> "$parts"
  spare=$((limit - (SECONDS - since)))
  if [ "$spare" -lt 0 ]; then spare=0; fi
}

# missing NAME REASON: a part that cannot be run, which is a failure too.
missing() {
  echo "== $1"
  echo "-- $1 not run: $2"
  printf '%s\tnot run: %s\t0\t0\n' "$1" "$2" >> "$parts"
}

# --- build ------------------------------------------------------------------------------------

if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  # Only for the GPU that is there; 9.0's own instructions are in 9.0a.
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c "
import torch
major, minor = torch.cuda.get_device_capability()
print(f'{major}.{minor}' + 'a' * (major == 9))")
  export TORCH_CUDA_ARCH_LIST
fi
# Into a folder of its own: whatever is installed stays as it is.
cd "$root" || exit 2
part build 150 "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps \
  --disable-pip-version-check --target "$work/site" .
export PYTHONPATH=$work/site

# The rest runs where the source tree cannot be imported in place of what was built.
mkdir "$work/tree"
cp -r tests benchmarks docs scripts pyproject.toml "$work/tree"
cd "$work/tree" || exit 2
part doctor 15 "$PYTHON" -c "from mfef_ext.inspection import doctor; print(doctor())"

# --- tests ------------------------------------------------------------------------------------

pytest=("$PYTHON" -m pytest -p no:cacheprovider -m gpu "${GPU_TESTS[@]}")
# Compilers, graphs and tensors of gigabytes by themselves: they must not take the others' time.
used=tests/backends/test_gpu.py
part tests 100 "${pytest[@]}" --ignore "$used" --junitxml "$out/tests.xml"

# --- benchmark of the kernels -----------------------------------------------------------------

# The backends that can run a block on this GPU, the reference excepted: that is the baseline.
backends=$("$PYTHON" - << 'END'
import torch

from mfef_ext import backends, problem

x = torch.zeros(1, 16, 8, 8, device="cuda")
conv = [torch.zeros(16, 16, 3, 3, device="cuda")]
fc1, fc2 = torch.zeros(1, 16, device="cuda"), torch.zeros(16, 1, device="cuda")
spatial = torch.zeros(1, 2, 7, 7, device="cuda")
asked = problem.describe_mfef_block(x, conv, [1], fc1, None, fc2, None, spatial, True)
able = [b.name for b in backends.order("cuda") if b.supports(asked)[0]]
print(*[name for name in able if name != "reference"])
END
)
if [ -z "$backends" ]; then
  missing bench_fusion "no backend has kernels that run here"
fi
for backend in $backends; do
  part "bench_fusion-$backend" 55 "$PYTHON" benchmarks/bench_fusion.py --device cuda --quick \
    --seconds 35 --backend "$backend" --out "$out/bench_fusion-$backend"
done

# --- compute-sanitizer ------------------------------------------------------------------------

sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer)

# sanitize TOOL LIMIT VARIABLE=VALUE...: over tests that reach every kernel.
sanitize() {
  local tool=$1 limit=$2
  shift 2
  if [ -z "$sanitizer" ]; then
    missing "sanitizer-$tool" "compute-sanitizer is neither on PATH nor in \$CUDA_HOME/bin"
  else
    part "sanitizer-$tool" "$limit" env "$@" \
      "$sanitizer" --tool "$tool" --error-exitcode 9 "${pytest[@]}" -x -k "$SANITIZED"
  fi
}
# One allocation of torch's holds many tensors; without it every overrun meets a border.
sanitize memcheck 40 PYTORCH_NO_CUDA_MEMORY_CACHING=1

# --- what is worth less -----------------------------------------------------------------------

part tests-as-used 40 "$PYTHON" -m pytest -p no:cacheprovider -m gpu "$used" --junitxml "$out/tests-as-used.xml"

# The kernels that shapes alone would choose: timing the others takes longer than there is here.
if [ -n "$backends" ]; then
  # shellcheck disable=SC2086 # a list of words
  part bench_training 25 env MFEF_TRITON_AUTOTUNE=0 "$PYTHON" benchmarks/bench_training.py \
    --device cuda --seconds 8 --backends $backends reference --out "$out/bench_training"
fi
sanitize racecheck 20
case " $backends " in
  *" triton "*)
    part bench_host 25 env MFEF_TRITON_AUTOTUNE=0 "$PYTHON" benchmarks/bench_host.py --rounds 10
    ;;
esac

# --- summary ----------------------------------------------------------------------------------

"$PYTHON" - "$parts" "$out" $((SECONDS - begin)) << 'END'
import csv
import json
import sys
from pathlib import Path

import torch

parts, out, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
names = ("part", "status", "seconds", "limit")
rows: list[dict] = [
    dict(zip(names, line.split("\t"), strict=True)) for line in parts.read_text().splitlines()
]
for row in rows:
    row |= {name: int(row[name]) for name in ("seconds", "limit")}
failed = [row["part"] for row in rows if row["status"] != "passed"]
gpu = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
facts = {"gpu": gpu, "seconds": seconds, "failed": failed, "parts": rows}
(out / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")
with open(out / "summary.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
lines = ["| part | status | seconds |", "|---|---|---:|"]
lines += [f"| {row['part']} | {row['status']} | {row['seconds']} |" for row in rows]
verdict = f"failed: {', '.join(failed)}" if failed else "all parts passed"
text = "\n".join([f"{gpu}; {seconds} s; {verdict}", "", *lines, ""])
(out / "summary.md").write_text(text)
print(text)
sys.exit(1 if failed else 0)
END
