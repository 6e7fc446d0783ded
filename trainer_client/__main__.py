"""``reward-trainer`` and ``python -m trainer_client``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without the packages of the extra "train", say how to install them."""
    try:
        from trainer_client.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("trainer_client"):
            raise
        sys.exit(f"reward-trainer needs {error.name}: pip install 'reward-trainer[train]'")
    app()


if __name__ == "__main__":
    main()
