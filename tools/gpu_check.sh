#!/usr/bin/env bash
# On a machine with a CUDA GPU (torch 2.11 / triton 3.6 or newer): the kernel tests in bf16 and all other types, then the
# benchmarks, into one JSON. Under 10 minutes. usage: tools/gpu_check.sh [OUTPUT.json]
# PYTHON chooses the interpreter; nothing is installed and nothing is built: the Triton kernels need no compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-gpu_check.json}
python=${PYTHON:-$( [ -x .venv/bin/python ] && echo .venv/bin/python || echo python3 )}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" - <<'PY'
import sys, torch, triton
if not torch.cuda.is_available():
    sys.exit("gpu_check.sh: torch sees no CUDA device; run it on a machine with one, with a CUDA build of torch")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
PY

export OPENCODER_TEST_DEVICE=cuda OPENCODER_NO_EXT=1
status=0
timeout 280 "$python" -m pytest -q -p no:cacheprovider -m "not slow" --junitxml "$work/tests.xml" \
    tests/kernels/test_rms_norm.py tests/kernels/test_elementwise.py tests/kernels/test_cross_entropy.py \
    tests/kernels/test_linear_cross_entropy.py tests/kernels/test_attention.py tests/kernels/test_optimizer.py \
    tests/kernels/test_registration.py tests/kernels/test_offsets.py || status=$?
timeout 280 "$python" -m opencoder.tools.bench_kernels --device cuda --json "$work/bench.json" || status=$?

"$python" - "$work" "$output" "$status" <<'PY'
import json, sys
import xml.etree.ElementTree as xml
from pathlib import Path

work, output, status = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
result = {"status": status, "tests": None, "bench": None}
if (work / "tests.xml").exists():
    suite = next(xml.parse(work / "tests.xml").getroot().iter("testsuite"))
    result["tests"] = {key: float(suite.get(key)) for key in ("tests", "failures", "errors", "skipped", "time")}
    result["failed"] = [
        f"{case.get('classname')}.{case.get('name')}: {' '.join((bad.get('message') or '').split())[:300]}"
        for case in suite.iter("testcase") for bad in case if bad.tag in ("failure", "error")
    ]
if (work / "bench.json").exists():
    result["bench"] = json.loads((work / "bench.json").read_text())
output.write_text(json.dumps(result, indent=1) + "\n")
print(f"{output}: status {status}, tests {result['tests']}")
PY
exit "$status"
