"""Gemma 4's assistants in files, as transformers writes them. A tensor that is unknown or missing is an error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokentree.errors import ModelError, PairingError
from tokentree.heads.assistant import ASSISTANTS, AssistantHead
from tokentree.heads.checkpoints import FLOATS, check_part
from tokentree.heads.fingerprint import Fingerprint
from tokentree.heads.mtp_files import model_of, read_from, taken, tensor_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BASE = "model."  # before the names of the layers' tensors
WHAT = "Gemma 4 assistant"
IDS = (torch.int64, torch.int32)


@torch.no_grad()
def read_assistant(folder: str | Path, dtype: torch.dtype, target: Fingerprint | None = None) -> AssistantHead:
    """The assistant in ``folder``, in ``dtype``.

    Raises:
        ModelError: if there is none, or a tensor is unknown, missing or of another size; it is named.
        PairingError: if its tokenizer isn't that of ``target``.
    """
    folder = Path(folder).expanduser()
    where, config = str(folder), _config(folder)
    theirs = None if target is None else target.tokenizer
    if theirs is not None and _tokenizer(folder) not in (None, theirs):
        raise PairingError(f"the assistant in {where!r} has another tokenizer than this model: it was made for another")
    tensors = read_from(tensor_files(folder))
    for name, tensor in tensors.items():
        check_part(tensor, list(tensor.shape), f"tensor {name}", where, (*FLOATS, *IDS))
    text, width, wide = config.text_config, config.text_config.hidden_size, config.backbone_hidden_size
    names = [name for name in ("lm_head.weight", f"{BASE}embed_tokens.weight") if name in tensors]
    output = taken(tensors, [*names, "lm_head.weight"][0], [text.vocab_size, width], where)
    tensors.pop(f"{BASE}embed_tokens.weight", None)  # the output layer's, or unused
    pre = taken(tensors, "pre_projection.weight", [width, 2 * wide], where)
    post = taken(tensors, "post_projection.weight", [wide, width], where)
    centroids, clusters, chosen = None, None, 0
    if config.use_ordered_embeddings:
        centroids = _linear(
            taken(tensors, "masked_embedding.centroids.weight", [config.num_centroids, width], where), dtype
        )  # fmt: skip
        clusters, chosen = _clusters(tensors, config, where), config.centroid_intermediate_top_k
    made = AssistantHead(
        _layers(text, tensors, dtype, where), _linear(pre, dtype), _linear(post, dtype), _linear(output, dtype),
        centroids, clusters, chosen,
    )  # fmt: skip
    return made.requires_grad_(False).eval()


def _config(folder: Path) -> Any:
    from transformers import AutoConfig  # takes a second

    from tokentree.misread import told

    with told(f"can't read the configuration in {str(folder)!r}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.model_type not in ASSISTANTS or config.text_config is None:
            raise ModelError(f"{str(folder)!r} has no {WHAT}")
        return config


def _tokenizer(folder: Path) -> str | None:
    """What a `Fingerprint` says of the tokenizer in ``folder``; None if there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    from tokentree.misread import told

    with told(f"can't load the tokenizer of {str(folder)!r}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return Fingerprint.of_sizes("", tokenizer).tokenizer


def _linear(weight: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.to(dtype))
    return made


def _clusters(tensors: dict[str, torch.Tensor], config: Any, where: str) -> torch.Tensor:
    """int64[clusters, tokens], each token in one of them.

    Raises:
        ModelError: if that can't be.
    """
    count, vocab = config.num_centroids, config.text_config.vocab_size
    if not 0 < config.centroid_intermediate_top_k <= count or vocab % count:
        raise ModelError(f"in {where!r} {config.centroid_intermediate_top_k} of {count} clusters share {vocab} tokens")
    name = "masked_embedding.token_ordering"
    check_part(tensors.get(name), [vocab], f"tensor {name}", where, IDS)
    ordering = tensors.pop(name).long()
    if not torch.equal(ordering.sort().values, torch.arange(vocab)):
        raise ModelError(f"in {where!r} the tensor {name} doesn't have each token once")
    return ordering.view(count, -1)


def _layers(text: PreTrainedConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype, where: str) -> Any:
    """transformers' model of the layers, without an embedding.

    Raises:
        ModelError: as `read_assistant`.
    """
    from transformers import AutoModel

    family, config = type(text), copy.deepcopy(text)
    # transformers 5.23 has no answer where all layers share what another model stores
    config.__class__ = type(family.__name__, (family,), {"kv_sharing_modes": ["reuse"] * text.num_hidden_layers})
    config.vocab_size, config.pad_token_id = 1, None
    if foreign := sorted(name for name in tensors if not name.startswith(BASE)):
        raise ModelError(f"{where!r} has a tensor that a {WHAT} doesn't have: {foreign[0]}")
    state = {name.removeprefix(BASE): tensor for name, tensor in tensors.items()}
    state["embed_tokens.weight"] = torch.zeros(1, config.hidden_size, dtype=dtype)  # transformers would draw it
    kind = AutoModel._model_mapping[family]
    return model_of(kind, config, state, dtype, lambda name: BASE + name, where, WHAT)
