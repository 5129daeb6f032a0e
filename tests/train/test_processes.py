"""Heads trained by two processes, as `accelerate launch` starts them, against one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_models import save_model, tiny, tiny_tokenizer
from tokentree import LLM
from tokentree.cli import main as cli

TWO = [
    sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--module",
]  # fmt: skip
KINDS = {
    "medusa": ["--heads", "2", "--batch-size", "64"],
    "eagle": ["--unroll", "2", "--batch-size", "8"],
    "medusa --way full": ["--heads", "2", "--batch-size", "8"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", tiny("llama", vocab_size=300, num_hidden_layers=8), tiny_tokenizer())
    data = tmp_path / "data.jsonl"
    texts = [
        " ".join(f"{word} {place}" for word in ("a tree", "an owl", "rain") * (2 + place % 3)) for place in range(80)
    ]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = ["tokentree", "train", *kind.split(), "--model", str(model), "--data", str(data), "--epochs", "2",
             "--evaluate-every", "3", "--dtype", "float32", "--threads", "1", *KINDS[kind]]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "one")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    one = capsys.readouterr()
    two = subprocess.run(
        [*TWO, *words, "--out", str(tmp_path / "two")], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr[-2000:]
    said = {"one": (one.out, one.err), "two": (two.stdout, two.stderr)}
    assert [out.count("heads are in") for out, _ in said.values()] == [1, 1]
    looks = {name: re.findall(r"step (\d+)/\d+: loss ([\d.]+)", err) for name, (_, err) in said.items()}
    assert len(looks["one"]) >= 3
    assert [step for step, _ in looks["one"]] == [step for step, _ in looks["two"]]  # told once
    # losses are told of the first process's half of a step, the weights are those of the whole
    for (_, alone), (_, shared) in zip(looks["one"], looks["two"], strict=True):
        assert float(shared) == pytest.approx(float(alone), rel=0.2)
    folders = [tmp_path / name / ("heads" if "--way" in kind else "") for name in said]
    base = tmp_path / "one" / "model" if "--way" in kind else model
    outputs = [LLM(base, heads=folder).generate("a tree")[0].token_ids for folder in folders[:1]]
    assert outputs[0]
    first, second = (_weights(folder) for folder in folders)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        change = float((second[name] - weight).norm() / weight.norm().clamp(min=1e-6))
        assert change < 0.1, (name, change)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: weight.float()
        for file in sorted(folder.glob("*.safetensors"))
        for name, weight in load_file(file).items()
        if weight.is_floating_point()
    }
