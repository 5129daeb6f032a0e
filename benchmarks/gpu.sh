#!/bin/bash
# Checks and measures the GPU engine, most important first; results as JSON in the folder $1. Parts: $2 and on, or all.
#     benchmarks/gpu.sh OUT [forward] [tiles] [prompts] [engine]
set -u
out=$1; shift; mkdir -p "$out"
parts=${*:-forward tiles prompts engine}
export PYTHONPATH=src:${PYTHONPATH:-} PYTHONUNBUFFERED=1
has() { [[ " $parts " == *" $1 "* ]]; }
warm() {  # $1: its options
    for i in $(seq 0 13); do timeout 150 python3 -m benchmarks.gpu_forward $1 --warm "$i/14" >/dev/null 2>>"$out/warm.log" & done
    wait
}

if has forward; then
    timeout 120 python3 -m benchmarks.gpu_forward --sizes smollm2 1.5b 8b --out "$out/forward.json" 2>&1 | tail -60
fi
if has tiles; then
    warm "--sweep"
    timeout 150 python3 -m benchmarks.gpu_forward --sweep --out "$out/tiles.json" 2>&1 | tail -20
fi
if has prompts; then
    warm "--sweep --prompts"
    timeout 60 python3 -m benchmarks.gpu_forward --sweep --prompts --out "$out/prompts.json" 2>&1 | tail -20
fi
