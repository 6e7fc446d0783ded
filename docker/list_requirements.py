"""Print the requirements that a pyproject.toml names: ``list_requirements.py PYPROJECT [EXTRA ...]``.

The images install them before the code is copied, so that a change of the code leaves their layer alone.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path


def requirements(pyproject: str, extras: Sequence[str] = ()) -> list[str]:
    """The ``project.dependencies`` of a pyproject.toml's text, then those of ``extras``; KeyError for one it lacks."""
    project = tomllib.loads(pyproject)["project"]
    found: list[str] = list(project["dependencies"])
    for extra in extras:
        found += project["optional-dependencies"][extra]
    return found


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2:])))
