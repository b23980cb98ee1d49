"""The command-line verbs, and the display of errors."""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from denoising_vit.cli.streams import INTERRUPTED, OK, WRONG_USAGE, Interrupted, logged, only_json
from denoising_vit.environment import package_version

#: Module of each verb, with its function after a colon if the name differs; or a mapping of subcommands.
VERBS: Mapping[str, Any] = {
    "denoise": "denoise",
    "fit": "store:fit",
    "train": "training:train",
    "distill": "training:distill",
    "calibrate": "backbones:calibrate",
    "diagnose": "diagnose",
    "prepare": "backbones:prepare",
    "evaluate": {
        "knn": "evaluate:knn",
        "segmentation": "evaluate:segmentation",
        "hummingbird": "evaluate:hummingbird",
        "clustering": "evaluate:clustering",
        "depth": "evaluate:depth",
        "discovery": "evaluate:discovery",
        "correspondence": "evaluate:correspondence",
        "artifacts": "diagnose:artifacts",
    },
    "video": "video",
    "report": "scores:report",
    "reproduce": "scores:reproduce",
    "show": "show",
    "export": "export",
    "models": "backbones:models",
    "app": "show:app",
    "store": {"info": "store:info", "verify": "store:verify", "export": "store:export"},
}

_DESCRIPTION = (
    "Artifact-free dense features from any Vision Transformer. Every verb takes `--quiet`, which hides progress. "
    "`dvit --version` prints the version."
)

#: Descriptions of verbs that have subcommands.
_DESCRIPTIONS: Mapping[str, str] = {
    "evaluate": "Evaluate raw and clean features side by side; `dvit evaluate --help` lists the tasks.",
    "store": "Inspect, verify or export a feature store that `dvit fit` wrote.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb and exit with 0 (success), 1 (some items failed), 2 (wrong usage) or 130 (interrupted)."""
    try:
        code = run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of the output has closed it (`dvit models | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    sys.exit(code)


def _show_warnings(show: Callable[[str, str], None]) -> None:
    """Show this package's warnings as messages, without the source line."""
    from denoising_vit.errors import DenoisingVitWarning

    before = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, DenoisingVitWarning):
            show(str(message), "warning")
        else:
            before(message, category, *where)

    warnings.showwarning = shown


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code.

    Raises:
        SystemExit: raised by the parser, with code 2 for wrong usage and 0 for ``--help``.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(f"dvit {package_version()}")
        return OK
    hidden = "--quiet" in arguments  # an option of all verbs
    arguments = [argument for argument in arguments if argument != "--quiet"]
    # Imported here, so that main also handles Ctrl-C during these imports.
    from denoising_vit.cli.reporting import print_error, print_note, quiet
    from denoising_vit.errors import DenoisingVitError

    app = _app(VERBS, arguments)
    try:
        alone = only_json() if "--json" in arguments else contextlib.nullcontext()
        with alone, quiet(hidden), logged(print_note), warnings.catch_warnings():
            _show_warnings(print_error)
            return app.cli(args=arguments, prog="dvit", description=_DESCRIPTION) or OK
    except Interrupted as stopped:
        print_note(str(stopped))
        return INTERRUPTED
    except DenoisingVitError as error:
        print_error(str(error))
        return WRONG_USAGE
    except BrokenPipeError:  # standard output was closed
        raise
    except OSError as error:
        print_error(
            f"{error.filename or 'a file'} could not be read or written ({error.strerror or error}); free disk space "
            "or fix the permissions, and run the command again"
        )
        return WRONG_USAGE


def _app(verbs: Mapping[str, Any], arguments: Sequence[str]) -> Any:
    """The parser of these verbs. Only the module of the given verb is imported."""
    import tyro

    app: Any = tyro.extras.SubcommandApp()
    named = arguments[0] if arguments else None
    for name, place in verbs.items():
        if name != named:
            app.command(_other(None if named in verbs else _description(name, place)), name=name)
        elif isinstance(place, str):
            module, function = _home(place)
            app.command(getattr(importlib.import_module(module), function), name=name)
        else:
            app.command(_app(place, arguments[1:]), name=name)
    return app


def _other(description: str | None) -> Callable[[], int]:
    """A placeholder for a verb that was not given, with its description for the help."""

    def stub() -> int:
        raise AssertionError("another verb was given")

    stub.__doc__ = description
    return stub


def _home(place: str) -> tuple[str, str]:
    """Module and function of a verb."""
    module, _, function = place.partition(":")
    return f"denoising_vit.cli.{module}", function or module


def _description(name: str, place: Any) -> str | None:
    """The docstring of a verb, read without importing its module."""
    if not isinstance(place, str):
        return _DESCRIPTIONS[name]
    module, function = _home(place)
    found = importlib.util.find_spec(module)
    assert found is not None and isinstance(found.loader, importlib.abc.InspectLoader)
    tree = ast.parse(found.loader.get_source(module) or "")
    return next(
        ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function
    )
