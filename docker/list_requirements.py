"""Print the requirements that a pyproject.toml names: ``list_requirements.py PYPROJECT``.

The image installs them before the code is copied, so that a change of the code leaves their layer alone.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: str) -> list[str]:
    """The ``project.dependencies`` of a pyproject.toml's text; raises KeyError where it has none."""
    dependencies: list[str] = tomllib.loads(pyproject)["project"]["dependencies"]
    return dependencies


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]).read_text(encoding="utf-8"))))
