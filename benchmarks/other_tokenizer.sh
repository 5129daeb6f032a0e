#!/usr/bin/env bash
# A draft model with another tokenizer: by shared tokens (tli), by text (slem), and transformers' assisted mode with
# both tokenizers, against plain decoding. Interleaved, on the same prompts.
#   benchmarks/other_tokenizer.sh TARGET DRAFT OUT PROMPTS.jsonl...
# The options are those of draft_model.sh.
set -euo pipefail
export METHODS=${METHODS:-plain draft_model:vocabulary=tli:chain:4 draft_model:vocabulary=slem:chain:4 \
draft_model:vocabulary=tli:2x2x1 draft_model:vocabulary=slem:2x2x1 draft_model:vocabulary=tli:cost \
draft_model:vocabulary=slem:cost draft_model+recycling+suffix+ngram:cost transformers transformers:assisted:4}
exec "$(dirname "$0")/draft_model.sh" "$@"
