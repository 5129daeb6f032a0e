"""One token tree, step by step: grown by a draft model, seen through its mask, judged by the target.

    python examples/tutorial_tree.py [TARGET DRAFT]

TARGET and DRAFT are folders or hub names of models with one tokenizer; without them, two tiny models with random
weights, which have little to say to each other.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tokentree.tutorial import build_tree, create_tree_mask, extract_all_paths, find_best_path, tree_speculative_decode


def main(target_name: str = "", draft_name: str = "") -> None:
    if not target_name:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        target, draft = (LlamaForCausalLM(config).eval() for _ in range(2))
        context = [5, 8, 13, 21, 34]
    else:
        target, draft = (AutoModelForCausalLM.from_pretrained(name) for name in (target_name, draft_name))
        context = AutoTokenizer.from_pretrained(target_name)("One, two, three, four. One, two,").input_ids

    tree = build_tree(context, draft, depth=2, branching=2)
    print("tree, as (token, parent):", *tree)
    print("mask:", *create_tree_mask(tree).tolist(), sep="\n  ")

    probs = [0.0] * len(tree)  # what the target gives each node after its parent
    for path in extract_all_paths(tree):
        ids = torch.tensor([[*context, *(tree[node][0] for node in path)]])
        with torch.inference_mode():
            next_probs = target(ids).logits[0, len(context) - 1 : -1].softmax(-1)
        for node, after in zip(path, next_probs, strict=True):
            probs[node] = float(after[tree[node][0]])
    best = find_best_path(tree, probs)
    print("most probable path:", [tree[node][0] for node in best])

    length = len(context) + 20
    text = tree_speculative_decode(context, target, draft, depth=3, branching=2, max_tokens=length)
    plain = target.generate(torch.tensor([context]), do_sample=False, max_length=length)[0].tolist()
    print("decoded:", text, "(identical to plain decoding)" if text == plain else "(a tie, or a bug)")


if __name__ == "__main__":
    main(*sys.argv[1:])
