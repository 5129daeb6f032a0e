"""Whether all of the wheel imports where nothing else is installed, with its extras, types and command."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

EXTRAS = {
    "gguf": ("accelerate", "gguf", "sentencepiece"),
    "gpu": ("triton",),
    "train": ("accelerate", "peft", "tensorboard"),
    "plot": ("matplotlib",),
    "chat": ("httpx", "prompt_toolkit"),
    "serve": ("fastapi", "prometheus_client", "sse_starlette", "uvicorn"),
}


def main() -> None:
    import tokentree

    home = Path(tokentree.__file__).parent
    assert "site-packages" in str(home), f"{home} is not an installed package"
    assert (home / "py.typed").is_file(), "py.typed is missing: users' type checkers ignore the annotations"
    for extra, packages in EXTRAS.items():
        for package in packages:
            importlib.import_module(package)
        print(f"{extra}: {', '.join(packages)}")
    shown = {file.name for file in (home / "serve/web").iterdir()}
    sources = Path(__file__).parent.parent / "src/tokentree/serve/web"
    assert shown == {file.name for file in sources.iterdir()}, f"of the server's page there are only {shown}"
    names = [module.name for module in pkgutil.walk_packages([str(home)], "tokentree.")]
    for name in names:
        if name != "tokentree.__main__":
            importlib.import_module(name)
    print(f"{len(names)} modules import")
    command = Path(sys.executable).with_name("tokentree")
    told = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "generate" in told


if __name__ == "__main__":
    main()
