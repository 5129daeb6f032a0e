"""Texts on a GPU, end to end: ids against plain decoding's, tokens a second, and where a step's time goes.

    python -m benchmarks.gpu_engine --model MODEL --prompts FILE --out FILE [--heads FOLDER] [--prompts-each N]
        [--max-tokens N] [--parts ids batch speed seeds transformers profile]

Results are written after each part, as JSON. "speed" is decoding alone, text by text, interleaved by prompt; "batch"
has 32 texts at once; "transformers" is its own `generate` with a static cache and a compiled forward, end to end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from tokentree import LLM, SamplingParams
from tokentree.loading import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prompts-each", type=int, default=3, help="of each kind")
    parser.add_argument("--seconds", type=float, default=120, help="for the whole run; what is begun ends")
    parser.add_argument("--parts", nargs="*", default=["speed", "batch", "seeds", "transformers", "profile"])
    options = parser.parse_args()
    started = time.perf_counter()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}

    def tell(name: str, said: Any) -> None:
        found[name] = said
        print(f"{name}: {said}", flush=True)
        options.out.write_text(json.dumps(found, indent=1))

    def late() -> bool:
        return time.perf_counter() - started > options.seconds

    prompts = read(options.prompts, options.prompts_each)
    llm = LLM(options.model, prefix_mb=0)
    tell("engine", llm.engine.info.signature)
    tell("seconds to load", round(time.perf_counter() - started, 1))
    ways = {"plain": llm.plain(), "look-ups": llm}
    if options.heads:
        ways["EAGLE and look-ups"] = llm.using("merged", heads=options.heads)
    for name, way in ways.items():  # compiles, records, measures costs
        begun = time.perf_counter()
        way.generate(prompts[0][1], SamplingParams(max_tokens=24))
        tell(f"seconds to begin, {name}", round(time.perf_counter() - begun, 1))
    params = SamplingParams(max_tokens=options.max_tokens)
    if "speed" in options.parts:
        tell("speed", speed(ways, prompts, params, late))
    if "seeds" in options.parts and not late():
        sampled = SamplingParams(max_tokens=options.max_tokens, temperature=0.8, seed=7)
        tell("seeds", speed(ways, prompts[:: max(1, len(prompts) // 13)], sampled, late))
    if "batch" in options.parts and not late():
        tell("batch", batches(ways, [text for _, text in prompts][:32], params))
    if "transformers" in options.parts and not late():
        tell("transformers", of_transformers(options.model, prompts[:13], options.max_tokens, late))


def read(file: Path, each: int) -> list[tuple[str, Any]]:
    """So many prompts of each kind, as kind and messages, the kinds by turns."""
    kinds = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        text = one["turns"][0] if "turns" in one else one["prompt"]
        kinds[one.get("category", "code")].append([{"role": "user", "content": text}])
    return [(kind, texts[i]) for i in range(each) for kind, texts in sorted(kinds.items()) if i < len(texts)]


def speed(ways: dict[str, LLM], prompts: list[tuple[str, Any]], params: SamplingParams, late: Any) -> dict[str, Any]:
    """Of each way: texts that are plain's, of how many; tokens a second decoding and end to end; ms of a step."""
    same: dict[str, int] = defaultdict(int)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 7)
    steps: dict[str, list[float]] = defaultdict(list)
    tried = 0
    for _, prompt in prompts:
        if late():
            break
        ids: dict[str, list[int]] = {}
        for name, way in ways.items():
            begun = time.perf_counter()
            result = way.generate(prompt, params)
            whole = time.perf_counter() - begun
            metrics, ids[name] = result.metrics, result.token_ids
            each = (
                len(ids[name]), metrics.decode_seconds, whole, metrics.target_forwards, metrics.draft_seconds,
                metrics.verify_seconds, metrics.accept_seconds,
            )  # fmt: skip
            sums[name] = [a + b for a, b in zip(sums[name], each, strict=True)]
            steps[name] += [seconds for _, _, seconds in metrics.steps]
        tried += 1
        for name in ways:
            same[name] += ids[name] == ids["plain"]
    return {
        name: {
            "texts as plain's": f"{same[name]} of {tried}",
            "decoding tokens/s": round(tokens / decoding, 1),
            "end to end tokens/s": round(tokens / whole, 1),
            "tokens a step": round(tokens / forwards, 3),
            "ms a step, median": round(1e3 * statistics.median(steps[name]), 3),
            "ms a step: draft, verify, accept": [round(1e3 * part / forwards, 3) for part in (draft, verify, accept)],
        }
        for name, (tokens, decoding, whole, forwards, draft, verify, accept) in sums.items()
    }


def batches(ways: dict[str, LLM], prompts: list[Any], params: SamplingParams) -> dict[str, Any]:
    """All at once: tokens a second, and texts that are those written alone."""
    alone = [ways["plain"].generate(prompt, params).token_ids for prompt in prompts]
    found = {}
    for name, way in ways.items():
        wide = way.scheduler(len(prompts))
        del wide
        way.max_batch = len(prompts)
        way.generate(prompts, SamplingParams(max_tokens=8))
        begun = time.perf_counter()
        results = way.generate(prompts, params)
        whole = time.perf_counter() - begun
        found[name] = {
            "tokens/s": round(sum(len(one.token_ids) for one in results) / whole, 1),
            "texts as alone": f"{sum(a == b.token_ids for a, b in zip(alone, results, strict=True))} of {len(prompts)}",
        }
    return found


def of_transformers(name: str, prompts: list[tuple[str, Any]], max_tokens: int, late: Any) -> dict[str, Any]:
    """Its own generate, greedy, with a static cache."""
    model = load_model(name, None, torch.device("cuda"))
    tokenizer = load_tokenizer(name)
    model.generation_config.cache_implementation = "static"
    tokens, seconds = 0, 0.0
    for number, (_, prompt) in enumerate([prompts[0], prompts[0], *prompts]):
        if late() and number > 4:
            break
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to("cuda")
        torch.cuda.synchronize()
        begun = time.perf_counter()
        out = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        torch.cuda.synchronize()
        if number > 1:
            seconds += time.perf_counter() - begun
            tokens += out.shape[1] - inputs["input_ids"].shape[1]
    return {"end to end tokens/s": round(tokens / seconds, 1), "texts": number - 1}


if __name__ == "__main__":
    main()
