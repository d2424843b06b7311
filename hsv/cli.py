"""The command line: `hsv pretrain | evaluate | embed | report | presets`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Literal

import jsonargparse
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from hsv import __version__
from hsv.config import METHODS, Config, preset_files, preset_named_in, preset_names, preset_path, read_yaml

__all__ = ["main"]

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

# An abbreviation would be accepted where it is parsed, and unseen where `_known` looks for the preset.
Parser = functools.partial(ArgumentParser, allow_abbrev=False)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for bad input, 128 + n after signal n."""
    arguments = _bracketed(sys.argv[1:] if arguments is None else arguments)
    command = next(iter(arguments), "")
    try:
        parsed = _parser(arguments if command == "pretrain" else []).parse_args(arguments)
        if command == "pretrain":
            _refuse_untrained(arguments, parsed.pretrain.objectives)
        return COMMANDS[parsed.command](parsed[parsed.command])
    except (ValueError, OSError) as error:
        print(f"hsv {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"hsv {command}: {str(stop) or 'stopped'}", file=sys.stderr)
        return 128 + signal.SIGINT
    except (FloatingPointError, RuntimeError) as error:
        if os.environ.get("HSV_DEBUG"):
            raise
        print(f"hsv {command}: {error} (HSV_DEBUG=1 shows where)", file=sys.stderr)
        return 1


def pretrain(arguments: Namespace) -> int:
    """`hsv pretrain`."""
    from hsv.train import pretrain as train

    nested = arguments.as_dict()
    values = {field.name: nested[field.name] for field in dataclasses.fields(Config)}
    if arguments.resume:
        values["output"] = str(arguments.resume)
    summary = train(Config.from_dict(values), resume=arguments.resume is not None)
    if int(os.environ.get("RANK", "0")) == 0:
        run_dir = shlex.quote(str(summary.run_dir))
        done = f"{summary.step:,} of {summary.steps:,} steps"
        speed = summary.images_per_second
        print(f"{done}, {speed:,.0f} images/s" if speed else f"nothing left to do: {done} are done")
        print(f"checkpoint  {summary.checkpoint}")
        print(f"encoder     {summary.encoder_call}")
        print(f"next        hsv evaluate {run_dir} --data LABELLED; hsv report {run_dir}")
        for warning in summary.warnings:
            print(f"warning     {warning}")
        if summary.failures:
            print(f"left out    {len(summary.failures)} broken files, named in {summary.run_dir / 'failures.jsonl'}")
        if summary.stopped_by:
            print(f"stopped by signal {summary.stopped_by}; go on with: hsv pretrain --resume {run_dir}")
    return 128 + summary.stopped_by if summary.stopped_by else 0


def evaluate(arguments: Namespace) -> int:
    """`hsv evaluate`."""
    from hsv.evaluate import differences, evaluation_file, format_table, read_evaluation
    from hsv.evaluate import evaluate as run

    file = evaluation_file(arguments.checkpoint, arguments.output)
    earlier = read_evaluation(file)
    result = run(**arguments.as_dict(), progress=True)
    print(f"{format_table(result)}\n\n{result['note']}")
    if file:
        others = differences(earlier, result) if earlier else ""
        print(f"saved       {file}" + (f", in place of an earlier one with {others}" if others else ""))
    if result["failures"]:
        print(f"left out    {len(result['failures'])} broken files, the first: {result['failures'][0][0]}")
    return 0


def embed(arguments: Namespace) -> int:
    """`hsv embed`."""
    from hsv.evaluate import embed as run

    features = run(**arguments.as_dict(), progress=True)
    print(f"{arguments.output}: {len(features)} images, {features.x.shape[1]} features each")
    if features.failures:
        print(f"left out    {len(features.failures)} broken files, the first: {features.failures[0][0]}")
    return 0


def report(arguments: Namespace) -> int:
    """`hsv report`."""
    from hsv.report import write_report

    print(write_report(arguments.run, output=arguments.output))
    return 0


def presets(arguments: Namespace) -> int:
    """`hsv presets`: the names in groups, each with its first line, or one preset whole."""
    if arguments.name:
        print(preset_path(arguments.name).read_text(), end="")
        return 0
    groups: dict[str, list[str]] = {}
    for name in preset_names():
        start = preset_named_in(preset_path(name))
        groups.setdefault(f"one method over {start}" if start else "any objectives", []).append(name)
    for title, names in sorted(groups.items()):
        print(f"{title}:")
        for name in names:
            print(f"  {name:12} {preset_path(name).read_text().splitlines()[0].removeprefix('# ')}")
    return 0


COMMANDS = {"pretrain": pretrain, "evaluate": evaluate, "embed": embed, "report": report, "presets": presets}


def _bracketed(arguments: list[str]) -> list[str]:
    """`--objectives simclr,mae` and `--objectives simclr mae` as the list that is meant, `[simclr,mae]`."""
    words, rest = [], list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        words.append(option + equals + value)
        if option == "--objectives" and (equals or not (rest or ["-"])[0].startswith("-")):
            named = _items(value if equals else rest.pop(0))
            while rest and set(_items(rest[0])) <= set(METHODS):
                named += _items(rest.pop(0))
            words[-1:] = [option, f"[{','.join(named)}]"]
    return words


def _items(text: str) -> list[str]:
    """What a list names, with brackets or without."""
    return [item for item in re.split(r"[\s,\[\]]+", text) if item]


def _known(arguments: list[str]) -> argparse.Namespace:
    """The arguments that decide which other ones there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--resume")
    parser.add_argument("--objectives", default="")
    parser.add_argument("--config", action="append", default=[])
    return parser.parse_known_args(arguments)[0]


def _objectives(known: argparse.Namespace) -> set[str]:
    """What is trained: the methods that `--objectives`, a file or the preset names, none for the default."""
    if known.objectives:
        return set(_items(known.objectives))
    files = [read_yaml(path) for path in (*_starting_point(known), *known.config)]
    return set(next((values["objectives"] or [] for values in reversed(files) if "objectives" in values), []))


def _refuse_untrained(arguments: list[str], objectives: list[str]) -> None:
    """Raise ValueError for an option of a method that is not trained; a file may have some, for other runs."""
    for word in arguments:
        option = word.partition("=")[0]
        method = option.removeprefix("--").partition(".")[0]
        if option.startswith("--") and method in set(METHODS) - set(objectives):
            allowed = f"options of the objectives, {', '.join(objectives)}"
            raise ValueError(f"{option[2:]}: got an option of {method}, which is not trained; allowed: {allowed}")


def _starting_point(known: argparse.Namespace) -> list[str]:
    """The configuration files that a preset or `--resume` stands for; their values become the defaults.

    The preset is that of `--preset`, or the one that a `--config` file names.
    """
    named = [preset for path in known.config if (preset := preset_named_in(path))]
    preset = known.preset or (named[-1] if named else None)
    files = [str(path) for path in preset_files(preset)]
    if known.resume:
        if known.preset:
            raise ValueError(
                f"preset: got {known.preset!r} with --resume; allowed: one of them, for a run keeps its own"
            )
        files.append(str(Path(known.resume) / "config.yaml"))
        if not Path(files[-1]).is_file():
            raise ValueError(f"resume: got {known.resume!r}; allowed: the folder of a run, which holds a config.yaml")
    return files


def _parser(arguments: list[str]) -> ArgumentParser:
    parser = Parser(prog="hsv", description="Self-supervised training of vision transformers.", version=__version__)
    commands = parser.add_subcommands(dest="command", required=True)
    commands.add_subcommand(
        "pretrain", _pretrain_parser(_known(arguments)), help="train an encoder on images without labels"
    )
    commands.add_subcommand("evaluate", _evaluate_parser(), help="20-NN and linear probe of an encoder")
    commands.add_subcommand("embed", _embed_parser(), help="write the features of a folder of images")

    run = Parser(description="Write the report page of a run.")
    run.add_argument("run", type=str, help="folder of the run")
    run.add_argument(
        "-o", "--output", type=str | None, help="the HTML file; unset = report.html in the folder of the run"
    )
    commands.add_subcommand("report", run, help="write the report page of a run")

    show = Parser(description="List the presets, or print one.")
    show.add_argument("name", type=str, nargs="?", help="the preset to print")
    commands.add_subcommand("presets", show, help="list the presets, or print one")
    return parser


def _pretrain_parser(known: argparse.Namespace) -> ArgumentParser:
    parser = Parser(
        usage="hsv pretrain [--preset NAME] [--config FILE] [--resume RUN] [--data DATA] [--objectives NAME,...] "
        "[--OPTION VALUE ...]",
        description="Train an encoder on images without labels. Later options override earlier ones, and all override "
        f"--preset and --resume. Each method has settings of its own ({', '.join(METHODS)}); --help shows those of "
        "--objectives or of the preset: `hsv pretrain --objectives dino --help`.",
        default_config_files=_starting_point(known),
    )
    parser.add_argument("--preset", help="configuration to start from; `hsv presets` lists them")
    parser.add_argument("--resume", help="folder of a run to go on with, under its own configuration")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options below")
    parser.add_class_arguments(Config)
    hidden = set(METHODS) - _objectives(known)
    for action in parser._actions:
        if action.dest.partition(".")[0] in hidden:
            action.help = argparse.SUPPRESS
    return parser


def _encoder_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help="folder of a run, a checkpoint, or an encoder.safetensors")
    parser.add_argument(
        "--pool",
        type=Literal["mean", "cls"] | None,
        help="mean of the patch tokens, or class token; unset = the encoder's own",
    )
    parser.add_argument("--batch_size", type=int, default=256, help="images at a time")
    parser.add_argument("--workers", type=int | None, help="processes that decode; unset = chosen from the cores")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")


def _evaluate_parser() -> ArgumentParser:
    parser = Parser(description="k-NN and linear probes on frozen features; the test part is read once.")
    _encoder_arguments(parser)
    parser.add_argument("--data", type=str, required=True, help="labelled images: digits, class folders, or tar shards")
    parser.add_argument("--limit", type=int | None, help="use at most so many training images")
    parser.add_argument("--test_limit", type=int | None, help="use at most so many test images")
    parser.add_argument("--k", type=int, default=20, help="neighbours that vote")
    parser.add_argument("--per_class", type=int, default=10, help="labels a class of the few-label probe")
    parser.add_argument("--draws", type=int, default=10, help="how often these labels are drawn")
    parser.add_argument("--seed", type=int, default=0, help="of splits, draws and the untrained encoder")
    parser.add_argument("--baselines", type=bool, default=True, help="also raw pixels and the untrained encoder")
    parser.add_argument("--output", type=str | None, help="JSON file; unset = evaluation.json in the folder of the run")
    return parser


def _embed_parser() -> ArgumentParser:
    parser = Parser(description="Write file names and features of a folder of images.")
    _encoder_arguments(parser)
    parser.add_argument("data", type=str, metavar="FOLDER", help="folder of images, tar shards, or digits")
    parser.add_argument(
        "--split",
        type=Literal["train", "test"] | None,
        help="the training or the test part; unset = a folder of images whole, of anything else the training part",
    )
    parser.add_argument("--limit", type=int | None, help="use at most so many images")
    parser.add_argument("-o", "--output", type=str, required=True, help="features.npz or features.parquet")
    return parser
