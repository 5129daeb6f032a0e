#!/usr/bin/env bash
# Heads against plain decoding, chains and the look-ups alone, interleaved; acceptance at 16 and at 64 nodes.
#   benchmarks/heads.sh TARGET HEADS OUT PROMPTS.jsonl...
# KIND=eagle for an EAGLE head (default: medusa). `default` is heads and look-ups, merged, sized by cost. Set METHODS to
# try others.
set -euo pipefail
target=$1 heads=$2 out=$3 kind=${KIND:-medusa}
shift 3
whole=depth=16,min_prob=0,min_reach=0
methods=${METHODS:-plain merged:chain:3 $kind:chain:3 recycling+suffix+ngram:cost $kind:cost default $kind:dynamic:nodes=16,$whole $kind:dynamic:nodes=64,$whole}
args=()
for file in "$@"; do args+=(--prompts "$file"); done
for method in $methods; do args+=(--method "$method"); done
exec "${TOKENTREE:-.venv/bin/tokentree}" bench --model "$target" --heads "$heads" "${args[@]}" --max-tokens "${TOKENS:-128}" \
  --per-category "${PER_CATEGORY:-2}" --turns "${TURNS:-1}" --dtype bfloat16 --threads "${THREADS:-2}" --out "$out"
