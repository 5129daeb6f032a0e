"""Sampling options that a model's own files suggest."""

from __future__ import annotations

from tokentree.names import find

SUGGESTED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def defaults_of(model: str) -> dict[str, float]:
    """The options of ``generation_config.json`` that differ from transformers' own; none of a GGUF file.

    Raises:
        ModelError: if ``model`` is nothing that a model can be in.
    """
    from transformers import GenerationConfig

    found = find(model)
    if found.file is not None:
        return {}
    try:
        config = GenerationConfig.from_pretrained(found.where, local_files_only=found.local_only)
    except OSError:  # it has none
        return {}
    told = config.to_diff_dict()
    return {name: told[name] for name in SUGGESTED if isinstance(told.get(name), int | float)}
