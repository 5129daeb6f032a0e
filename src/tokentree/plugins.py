"""What has a name: ours, and what installed packages add by entry points. It is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from tokentree.errors import OptionError


@dataclass(frozen=True)
class Registry:
    """Things of one kind, by name.

    Args:
        kind: what they are, in the singular.
        group: of the entry points by which other packages add some.
        ours: where each of ours is, as ``module:name``. No package can take such a name.
    """

    kind: str
    group: str
    ours: Mapping[str, str]

    def installed(self) -> dict[str, str]:
        """What other packages have added that are installed here, with the package of each."""
        return {point.name: point.dist.name if point.dist else "?" for point in entry_points(group=self.group)}

    def named(self, name: str) -> Any:
        """What is there under that name.

        Raises:
            OptionError: if there is nothing, if two packages have it, or if it can't be imported.
        """
        if isinstance(name, str) and name in self.ours:
            return imported(self.ours[name])
        found = [point for point in entry_points(group=self.group) if point.name == name]
        if not found:
            known = ", ".join(sorted({*self.ours, *self.installed()}))
            raise OptionError(f"unknown {self.kind} {name!r}: choose one of {known}")
        packages = [point.dist.name if point.dist else point.value for point in found]
        if len(found) > 1:
            raise OptionError(f"the {self.kind} {name!r} is in several packages: {', '.join(sorted(packages))}")
        try:
            return found[0].load()
        except (ImportError, AttributeError) as error:
            raise OptionError(f"the {self.kind} {name!r} of {packages[0]} can't be imported: {error}") from error


def imported(where: str) -> Any:
    """What is at ``module:name``."""
    module, _, attribute = where.partition(":")
    return getattr(import_module(module), attribute)
