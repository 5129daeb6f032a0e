#!/usr/bin/env bash
# A draft model's chains and trees against plain decoding and transformers, interleaved, on two prompt sets.
#   benchmarks/draft_model.sh TARGET DRAFT OUT PROMPTS.jsonl...
# DRAFT is about a third of the target's size here, so that the draft's own time decides. Set METHODS to try others.
set -euo pipefail
target=$1 draft=$2 out=$3
shift 3
methods=${METHODS:-plain draft_model:chain:3 draft_model:chain:4 draft_model:2x2x1 draft_model:dynamic:nodes=16,depth=4,top_k=4 transformers:assisted:3}
args=()
for file in "$@"; do args+=(--prompts "$file"); done
for method in $methods; do args+=(--method "$method"); done
exec "${TOKENTREE:-.venv/bin/tokentree}" bench --model "$target" --draft-model "$draft" "${args[@]}" \
  --max-tokens "${TOKENS:-128}" --per-category "${PER_CATEGORY:-3}" --turns "${TURNS:-1}" --dtype bfloat16 --threads 2 --out "$out"
