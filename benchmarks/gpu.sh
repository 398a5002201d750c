#!/usr/bin/env bash
# Everything that needs a GPU: the gpu tests, then the benchmarks. All JSON lines go to one file,
# $OUT/DATE-gpu.jsonl, or benchmarks/results/DATE-gpu.jsonl without OUT.
#
#   benchmarks/gpu.sh                                   in the project's environment
#   PYTHON=python3 COMMIT=… benchmarks/gpu.sh           on a machine with neither .venv nor .git
#
# QUICK=1 uses small sizes, to try the script itself.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
results=${OUT:-benchmarks/results}/$(date +%F)-gpu.jsonl
mkdir -p "$(dirname "$results")"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export COMMIT=${COMMIT:-$(git rev-parse HEAD 2>/dev/null)}
workers=$(($(nproc) > 2 ? $(nproc) - 2 : 2))
failed=0

# extract and the run directories name the installed version of sidecache
"$PYTHON" -c 'import importlib.metadata as m; m.version("sidecache")' 2>/dev/null ||
    "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --editable . || exit 1

measure() { # NAME COMMAND… : run it, keep its JSON line, go on if it fails
    echo "== ${*:2}" >&2
    if ! "${@:2}" | tee -a "$results"; then
        echo "{\"benchmark\": \"$1\", \"failed\": \"${*:2}\"}" | tee -a "$results"
        failed=1
    fi
}

tests() {
    local code log
    log=$(mktemp)
    "$PYTHON" -m pytest -q -m gpu >"$log" 2>&1
    code=$?
    cat "$log" >&2
    hardware=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader)
    "$PYTHON" - "$code" "$(tail -n 1 "$log")" "$hardware" <<'END'
import json, os, platform, sys
code, summary, hardware = sys.argv[1:]
print(json.dumps({"benchmark": "gpu_tests", "exit": int(code), "summary": summary,
                  "hardware": hardware, "cpus": os.cpu_count(), "commit": os.environ["COMMIT"],
                  "platform": platform.platform()}))
END
    rm -f "$log"
    return "$code"
}

if [ -n "${QUICK:-}" ]; then
    extract=(--images 128 --rounds 1)
    read=(--rows 32 --rounds 2)
    train=(--rows 64 --epochs 2 --steps 2 --rounds 2)
    members=(--members 4 --loop 2 --rows 64 --rounds 2)
    stream=(--members 1,4 --rows 64 --rounds 2)
else
    extract=(--images 4096 --batch-size 128 --rounds 3)
    read=(--rows 400)
    train=(--rows 1024 --epochs 5 --steps 10 --rounds 5)
    members=(--members 4,16,64 --loop 16 --rows 1024 --epochs 2 --rounds 5)
    stream=(--members 1,4,16,64 --rows 2048 --rounds 3)
fi

measure gpu_tests tests
for model in vit_base_patch16_224 vit_tiny_patch16_224; do
    measure extract "$PYTHON" benchmarks/extract.py --device cuda --workers "$workers" \
        --model "$model" "${extract[@]}"
done
measure read "$PYTHON" benchmarks/read.py "${read[@]}"
measure train "$PYTHON" benchmarks/train.py --device cuda "${train[@]}"
measure members "$PYTHON" benchmarks/members.py --device cuda "${members[@]}"
measure stream "$PYTHON" benchmarks/stream.py --device cuda "${stream[@]}"
echo "written to $results" >&2
exit "$failed"
