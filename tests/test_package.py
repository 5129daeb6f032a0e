"""What `import tokentree` gives."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tokentree


def test_every_public_name_is_there_and_sorted_for_readers() -> None:
    for name in tokentree.__all__:
        assert getattr(tokentree, name).__name__ == name
    assert dir(tokentree) == sorted(tokentree.__all__)
    homes = [name for names in tokentree._HOMES.values() for name in names]
    assert sorted(homes) == sorted(tokentree.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_it"):
        tokentree.nothing_like_it  # noqa: B018


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, tokentree.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_types_are_told_of_all_public_names() -> None:
    tree = ast.parse(Path(tokentree.__file__).read_text(encoding="utf-8"))
    told = {
        name.name
        for block in tree.body
        if isinstance(block, ast.If)
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for name in line.names
    }
    assert told >= {name for name in tokentree.__all__ if name[0] != "_"}
