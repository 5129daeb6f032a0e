"""Large tensors in memory of their own, which goes back to the system with them."""

from __future__ import annotations

import math
import mmap

import torch

LEAST = 1 << 17  # bytes of a tensor that is worth pages of its own


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeros. A large one on a CPU is mapped: allocators keep what is freed, in pieces that the next one may
    not fit into, so a process whose KV comes and goes would grow. Pages take memory once they are written to."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and nbytes >= LEAST and hasattr(mmap, "MAP_ANONYMOUS"):
        try:
            pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # a system allows only so many maps
            pass
        else:
            return torch.frombuffer(pages, dtype=dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def cloned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in memory of its own."""
    return zeros(*tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
