"""`hsv` and `python -m hsv`: the command line, or one sentence if what the trainer needs is not installed."""

import sys

from hsv import missing_dependency, share_processors


def main() -> int:
    """Run the command line; returns its exit status."""
    share_processors()
    try:
        from hsv.cli import main as run

        return run()
    except ModuleNotFoundError as error:
        print(f"hsv: {missing_dependency(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
