"""``lka-train DATA [options]``: typed options or a YAML file, errors without tracebacks."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from lka_kernels.methods import METHODS

from .config import TrainConfig
from .errors import TrainError
from .files import shown
from .folder import CONFIG_NAME

_DESCRIPTION = "Trains a timm model on class folders of images, by default with a frozen backbone."
_FLAGS = {f.name for f in dataclasses.fields(TrainConfig) if f.type == "bool"}
_LISTS = {f.name for f in dataclasses.fields(TrainConfig) if f.type.startswith("list")} | {
    f"{method.name}.{f.name}"
    for method in METHODS.values()
    for f in dataclasses.fields(method.options)
    if f.type.startswith("tuple")
}
_YAML = "lka-train-yaml"
_TRUE_OR_FALSE = {"true", "false", "yes", "no"}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (0, 1 for TrainError, 130 for Ctrl-C)."""
    try:
        config, options = parse(sys.argv[1:] if arguments is None else arguments)
        from .run import train  # heavy imports after the options are known to be sound

        train(config, options)
    except TrainError as error:
        print(shown(f"lka-train: error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lka-train: interrupted; --resume continues from the last checkpoint",
              file=sys.stderr)  # fmt: skip
        return 130
    return 0


def parse(arguments: list[str]) -> tuple[TrainConfig, Any]:
    """Command-line arguments to the run's options and the method's options.

    Option names take dashes or underscores alike (``--batch-size``, ``--batch_size``); yes/no
    options may stand without a value, lists as words. ``--resume --out FOLDER`` alone takes all
    else from the folder's ``config.yaml``.
    """
    arguments = normalise(arguments)
    parser = make_parser()
    parsed = parser.parse_args(_with_saved_config(arguments))
    values = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(TrainConfig)}
    values["data"] = parsed.DATA or parsed.data
    config = TrainConfig(**values)
    if config.method not in METHODS:
        raise TrainError(f"--method {config.method} is unknown; there are {', '.join(METHODS)}")
    method = METHODS[config.method]
    chosen = getattr(parsed, method.name, None)
    options = method.options(**vars(chosen)) if chosen is not None else method.options()
    return config, options


def make_parser():
    """The jsonargparse parser: the run's options, and a group for each method's."""
    import yaml
    from jsonargparse import ArgumentParser, get_loader, set_loader

    plain = get_loader("yaml")

    def load(text: str) -> Any:
        try:
            return plain(text)
        except yaml.YAMLError:
            # libyaml refuses the escapes of names that are not UTF-8; PyYAML reads what it wrote.
            return yaml.safe_load(text)

    set_loader(_YAML, load, (yaml.YAMLError,))
    parser = ArgumentParser(prog="lka-train", description=_DESCRIPTION, parser_mode=_YAML)
    parser.add_argument("--config", action="config", help="YAML file with options")
    # A positional argument of another name than the option: its default, "", would otherwise
    # override the "data" of a YAML file.
    parser.add_argument(
        "DATA", type=str, nargs="?", default="",
        help="folder of class folders, or of train and test (or val) halves that hold them",
    )  # fmt: skip
    parser.add_class_arguments(TrainConfig)
    for method in METHODS.values():
        if dataclasses.fields(method.options):
            parser.add_class_arguments(method.options, method.name)
    return parser


def normalise(arguments: list[str]) -> list[str]:
    """Arguments as the parser takes them.

    Dashes within option names become underscores; bare yes/no options get their value; options
    that are lists take plain words, ``--exclude "*_mask*" --exclude "0*"``, beside a list of YAML.
    """
    result = []
    lists: dict[str, list[str]] = {}
    place = -1
    while (place := place + 1) < len(arguments):
        argument = arguments[place]
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            following = arguments[place + 1] if place + 1 < len(arguments) else "--"
            if not equals and name in _FLAGS and following.lower() not in _TRUE_OR_FALSE:
                equals, value = "=", "true"
            elif not equals and name.startswith("no_") and name[3:] in _FLAGS:
                name, equals, value = name[3:], "=", "false"
            if name in _LISTS and (equals or not following.startswith("--")):
                if not equals:
                    place += 1
                    equals, value = "=", following
                if not _is_list(value):
                    lists.setdefault(name, []).append(value)
                    continue
            argument = f"--{name}{equals}{value}"
        result.append(argument)
    return result + [f"--{name}={json.dumps(words)}" for name, words in lists.items()]


def _is_list(text: str) -> bool:
    import yaml

    try:
        return isinstance(yaml.safe_load(text), list)
    except yaml.YAMLError:  # such as *_mask*, a reference to nothing
        return False


def _with_saved_config(arguments: list[str]) -> list[str]:
    """``--resume`` takes the options of the run's own file as defaults."""
    if "--resume=true" not in arguments and "--resume" not in arguments:
        return arguments
    out = ""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--out":
            out = value if equals else next(iter(arguments[place + 1 : place + 2]), "")
    saved = Path(out) / CONFIG_NAME
    return ["--config", str(saved), *arguments] if out and saved.is_file() else arguments
