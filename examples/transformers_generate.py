"""Tree speculation inside transformers' own `generate`.

    python examples/transformers_generate.py [TARGET [DRAFT]]

TARGET and DRAFT are folders or hub names of models. Without a draft model, what follows is looked up
in the text itself. Without arguments the target is a tiny model with random weights that drafts for itself.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TextStreamer

from tokentree.hf import generator


def main(target_name: str = "", draft_name: str = "") -> None:
    if not target_name:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        target = LlamaForCausalLM(config).eval()
        inputs = {"input_ids": torch.tensor([[5, 8, 13, 21, 34]])}
        speculate = generator(target, shape="2x2x2")
    else:
        tokenizer = AutoTokenizer.from_pretrained(target_name)
        # in bfloat16 transformers' own loop rounds differently, so a near tie may go the other way there
        target = AutoModelForCausalLM.from_pretrained(target_name, dtype=torch.float32)
        inputs = dict(tokenizer("One, two, three, four. One, two,", return_tensors="pt"))
        speculate = generator(draft_name or None, shape="2x2x2", streamer=TextStreamer(tokenizer))

    options = {"max_new_tokens": 40, "do_sample": False}
    ids = target.generate(**inputs, **options, custom_generate=speculate)
    plain = target.generate(**inputs, **options)

    metrics = speculate.metrics[0]
    print(f"{metrics.new_tokens} tokens in {metrics.target_forwards} forwards of the target")
    print("identical to plain decoding" if torch.equal(ids, plain) else "differs from plain decoding: a tie, or a bug")


if __name__ == "__main__":
    main(*sys.argv[1:])
