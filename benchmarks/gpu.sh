#!/usr/bin/env bash
# Everything that needs a GPU, in one call on a bare machine: the environment (`make setup`), the
# gpu tests, the benchmarks. All JSON lines go to one file, $OUT/DATE-gpu.jsonl, or
# benchmarks/results/DATE-gpu.jsonl without OUT; each has its date, hardware, commit and command.
#
#   benchmarks/gpu.sh                               needs Python 3.11+, git, make, and PyPI once
#   PYTHON=python3 COMMIT=… benchmarks/gpu.sh       with what that Python has: no network, no git
#
# Caches go below $TMPDIR: 20 GB. QUICK=1 uses small sizes, to try the script itself.
set -uo pipefail
cd "$(dirname "$0")/.."

if [ -z "${PYTHON:-}" ]; then
    make setup >&2 || exit 1
    PYTHON=.venv/bin/python
fi
results=${OUT:-benchmarks/results}/$(date +%F)-gpu.jsonl
mkdir -p "$(dirname "$results")" || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export COMMIT=${COMMIT:-$(git rev-parse HEAD 2>/dev/null)}
workers=$(($(nproc) > 2 ? $(nproc) - 2 : 2))
failed=0

"$PYTHON" -c 'import torch; raise SystemExit(None if torch.cuda.is_available() else (
    f"gpu.sh: torch {torch.__version__} sees no GPU. nvidia-smi must list one, with a driver for "
    "that CUDA."))' || exit 1

measure() { # NAME ARGUMENT… : run benchmarks/NAME.py, keep its JSON line, go on if it fails
    local command=("$PYTHON" "benchmarks/$1.py" "${@:2}")
    echo "== ${command[*]}" >&2
    if ! "${command[@]}" | tee -a "$results"; then
        printf '{"benchmark": "%s", "failed": "%s", "commit": "%s", "date": "%s"}\n' \
            "$1" "${command[*]}" "$COMMIT" "$(date +%F)" | tee -a "$results"
        failed=1
    fi
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

measure gpu_tests --device cuda
for model in vit_base_patch16_224 vit_tiny_patch16_224; do
    measure extract --device cuda --workers "$workers" --model "$model" "${extract[@]}"
done
measure read "${read[@]}"
measure train --device cuda "${train[@]}"
measure members --device cuda "${members[@]}"
measure stream --device cuda "${stream[@]}"
echo "written to $results" >&2
exit "$failed"
