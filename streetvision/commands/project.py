"""The project itself: what this machine has, presets, the pipeline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from streetvision.commands.common import PARAMS, Add, say


def register(add: Add) -> None:
    """Add these commands."""
    add("doctor", _doctor, "check Python, libraries, GPUs, Git, DVC and disk")
    preset = add("preset", _preset, "print a preset as shell-quoted overrides for `dvc exp run`")
    preset.add_argument("name", nargs="?", help="without a name: list all presets")
    repro = add(
        "repro", _repro, "run `dvc repro`, optionally with a preset; params.yaml stays as it is"
    )
    repro.add_argument("--preset")
    pin = add("pin", _pin, "print the newest commit of a data set on the hub")
    pin.add_argument("repo_id", help="owner/name")

    subnet = add("subnet", _subnet, "list what the subnet's validators sent, era by era")
    subnet.add_argument("--json", action="store_true", help="print JSON")


def _doctor(_: argparse.Namespace) -> int:
    from streetvision.doctor import run_checks

    checks = run_checks(Path.cwd())
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = {True: "ok", False: "MISSING OR TOO OLD", None: "optional"}[check.ok]
        say(f"{check.name:{width}}  {check.found}  ({mark})")
    return int(any(check.ok is False for check in checks))


def _preset(options: argparse.Namespace) -> None:
    from streetvision.documents import read_yaml
    from streetvision.presets import load_preset, overrides, preset_names

    if options.name is None:
        say("\n".join(preset_names()))
        return
    current = read_yaml(Path(PARAMS).read_bytes(), PARAMS) if Path(PARAMS).exists() else {}
    say(" ".join(overrides(load_preset(options.name, Path.cwd()), current)))


def _repro(options: argparse.Namespace) -> int:
    from streetvision.repro import reproduce

    return reproduce(Path.cwd(), options.preset)


def _pin(options: argparse.Namespace) -> None:
    from streetvision.data.hub import latest_revision

    say(latest_revision(options.repo_id))


def _subnet(options: argparse.Namespace) -> None:
    from streetvision.subnet.listing import as_json, as_table

    say(json.dumps(as_json(), indent=2) if options.json else as_table())
