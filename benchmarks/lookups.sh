#!/usr/bin/env bash
# Drafts that need no training, against plain decoding, the best chain and transformers' prompt lookup, interleaved.
#   benchmarks/lookups.sh TARGET OUT PROMPTS.jsonl...
# Drafters start without memories; WARM names a prompt file that they learn from before. Set METHODS to try others.
set -euo pipefail
target=$1 out=$2
shift 2
methods=${METHODS:-plain merged:chain:3 default transformers:lookup:10}
args=()
for file in "$@"; do args+=(--prompts "$file"); done
for method in $methods; do args+=(--method "$method"); done
for file in ${WARM:-}; do args+=(--warm "$file"); done
exec "${TOKENTREE:-.venv/bin/tokentree}" bench --model "$target" "${args[@]}" --max-tokens "${TOKENS:-128}" \
  --per-category "${PER_CATEGORY:-5}" ${TURNS:+--turns "$TURNS"} --dtype bfloat16 --threads "${THREADS:-2}" --out "$out"
