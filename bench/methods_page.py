"""The tables of docs/methods.md: each method's longest run, and the hybrids of one length beside their parts.

    python -m bench.methods_page

writes them anew from bench/results/methods.json; bench.methods does so after each run.
"""

import math
import shlex

from bench.methods_runs import HYBRIDS, Run, kept, preset_digest
from bench.paths import ROOT
from hsv.config import METHODS
from hsv.monitor import collapse_verdict

PAGE, MARK = ROOT / "docs" / "methods.md", "<!-- figures:"
WANTED = 0.05  # of accuracy above the untrained encoder


def main() -> None:
    """Replace what follows the mark."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index("\n", text.index(MARK)) + 1] + "\n" + figures(kept()), encoding="utf-8")


def figures(found: list[Run]) -> str:
    """The calls that made what is shown, the tables, and the command of each run."""
    methods, hybrids = longest(found), beside_their_parts(found)
    shown = [*methods, *hybrids]
    return "\n".join(
        [
            *("Made by", "", "```", *calls(shown), "```", ""),
            *dict.fromkeys(map(_machine, shown)),
            *("Loss: mean of the first and of the last five logged values. Minutes: of training.", ""),
            *(*table(methods), ""),
            *("### The hybrid beside its parts, at equal wall time", ""),
            *(*table(hybrids), ""),
            *(
                "### Commands",
                "",
                "From the repository's root; `--run.steps`, with the steps of the table, in place of",
            ),
            *("`--minutes` repeats a run whatever the machine's speed.", ""),
            *("```", *dict.fromkeys(run.command for run in shown), "```", ""),
        ]
    )


def longest(found: list[Run]) -> list[Run]:
    """The longest run of each method."""
    by_name = {run.name: run for run in sorted(found, key=_seconds)}
    return [by_name[name] for name in METHODS if name in by_name]


def beside_their_parts(found: list[Run]) -> list[Run]:
    """The hybrids of the length that has most of them, and their parts of the same length."""
    lengths = {run.length: [one for one in found if one.length == run.length] for run in found}
    together = max(lengths.values(), key=lambda runs: sum(run.name in HYBRIDS for run in runs), default=[])
    by_name = {run.name: run for run in together}
    return [by_name[name] for name in ("simclr", "mae", *HYBRIDS) if name in by_name]


def calls(shown: list[Run]) -> list[str]:
    """A call of make for the runs of each length, the one of most runs first."""
    names: dict[str, list[str]] = {}
    for run in shown:
        names.setdefault(_call(run), []).append(run.name)
    together = sorted(names.items(), key=lambda one: -len(one[1]))
    return [f"{call} METHODS={shlex.quote(','.join(dict.fromkeys(runs)))}" for call, runs in together]


def _call(run: Run) -> str:
    words = shlex.split(run.command)
    data = words[words.index("--data") + 1]
    number, unit = run.length.split()
    load = f"THREADS={run.origin['threads']} JOBS={run.origin['jobs']}"
    return f"make methods DATA={shlex.quote(data)} {unit.upper()}={number} {load}"


def _machine(run: Run) -> str:
    where = run.origin
    threads = f"{where['threads']} thread{'s' * (where['threads'] > 1)} a run, {where['jobs']} at a time"
    return f"{where['cpu']}, {threads}, PyTorch {where['torch']}."


def _seconds(run: Run) -> float:
    """Of training: those that were asked for where a run failed, whose steps count as the longest."""
    number, unit = run.length.split()
    asked = 60 * float(number) if unit == "minutes" else math.inf
    return asked if run.failure else run.seconds


def table(found: list[Run]) -> list[str]:
    """Lines of a Markdown table."""
    heads = ("", "20-NN", "untrained", "gain", "spread", "rank", "loss", "minutes", "steps", "images/s", "measured", "")
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *map(_line, found)]


def _line(run: Run) -> str:
    if run.failure:
        return f"| {run.name} |" + " |" * 10 + f" failed: {run.failure.replace('|', '/')} |"
    gain = run.knn - run.untrained
    alone = len(run.losses) == 2
    losses = {key: ends for key, ends in run.losses.items() if key != "total"}
    shown = [f"{'' if alone else key + ' '}{first:.3g} → {last:.3g}" for key, (first, last) in losses.items()]
    cells = [
        *(run.name, f"{100 * run.knn:.1f} % ({run.pool})", f"{100 * run.untrained:.1f} %", f"{100 * gain:+.1f}"),
        *(f"{run.spread:.2f}", f"{run.rank:.0f}", ", ".join(shown), f"{run.seconds / 60:.1f}", f"{run.steps:,}"),
        *(f"{run.images_per_second:,.0f}", f"{run.origin['date'][:10]} {run.origin['commit']}", _remarks(run)),
    ]
    return f"| {' | '.join(cells)} |"


def _remarks(run: Run) -> str:
    """Where the run falls short, and whether its preset is still the one that it had."""
    verdict = collapse_verdict(spread=run.spread, rank=run.rank)
    if not verdict and run.knn - run.untrained < WANTED:
        verdict = f"less than {100 * WANTED:.0f} points above untrained"
    changed = run.origin.get("preset") not in (None, preset_digest(run.name))
    return "; ".join(filter(None, [verdict, "preset changed since" if changed else None]))


if __name__ == "__main__":
    main()
