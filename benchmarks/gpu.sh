#!/bin/bash
# Checks and measures the GPU engine; results as JSON in the folder $1, parts of the work behind it, or all.
#     MODEL=… PROMPTS=… benchmarks/gpu.sh OUT [engine] [forward] [int8] [transformers] [tiles] [prompts]
# Every part can be run alone. The first four take some five minutes.
set -u
out=$1; shift; mkdir -p "$out"
parts=${*:-engine forward int8 transformers}
heads=${HEADS:-heads/smollm2-135m/eagle}
export PYTHONPATH=src:${PYTHONPATH:-} PYTHONUNBUFFERED=1
has() { [[ " $parts " == *" $1 "* ]]; }
warm() {  # compiles what a sweep tries, in many processes; $1: its options
    for i in $(seq 0 13); do timeout 150 python3 -m benchmarks.gpu_forward $1 --warm "$i/14" >/dev/null 2>>"$out/warm.log" & done
    wait
}
engine() {  # $1: the file, the rest: options
    timeout 160 python3 -m benchmarks.gpu_engine --model "$MODEL" --prompts "$PROMPTS" --out "$out/$1" "${@:2}" 2>&1 | tail -40
}

if has engine; then
    engine engine.json --heads "$heads" --prompts-each 8 --seconds 100 --parts speed seeds batch
    grep -q '"speed"' "$out/engine.json" || engine look-ups.json --prompts-each 8 --seconds 70 --parts speed seeds batch
fi
if has forward; then
    timeout 90 python3 -m benchmarks.gpu_forward --sizes smollm2 1.5b 8b --out "$out/forward.json" 2>&1 | tail -60
fi
if has int8; then
    timeout 45 python3 -m benchmarks.gpu_forward --bits 8 --sizes 8b --out "$out/int8.json" 2>&1 | tail -20
    timeout 70 python3 -m benchmarks.gpu_forward --bits 8 --sizes 70b --out "$out/int8-70b.json" 2>&1 | tail -20
fi
if has transformers; then
    engine transformers.json --seconds 60 --parts transformers
fi
if has tiles; then
    warm "--sweep"
    timeout 150 python3 -m benchmarks.gpu_forward --sweep --out "$out/tiles.json" 2>&1 | tail -20
fi
if has prompts; then
    warm "--sweep --rows 512"
    timeout 60 python3 -m benchmarks.gpu_forward --sweep --rows 512 --out "$out/prompts.json" 2>&1 | tail -20
fi
