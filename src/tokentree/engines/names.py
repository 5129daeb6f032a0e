"""The registry of engines: who makes each one, and those that installed packages add.

A maker takes a model (a name, a loaded model, or None) and `EngineOptions`, and gives an `Engine`.
"""

from __future__ import annotations

from tokentree.plugins import Registry

TORCH = "torch"  # the default: see `engines.plan` for what it makes
ENGINES = Registry("engine", "tokentree.engines", {TORCH: "tokentree.loading:load_engine"})
