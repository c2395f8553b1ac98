"""`rocketkv env`: versions, devices and the backend of each, for bug reports."""

import argparse
import json
import sys
from typing import Any

GIBI = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the environment; returns the exit code."""
    import torch

    from ..backend import cpu_hint
    from ..environment import environment

    found, hint = environment(), cpu_hint(torch.device("cpu"))
    text = "\n".join([_text(found), hint] if hint else [_text(found)])
    sys.stdout.write((json.dumps(found, indent=2) if args.json else text) + "\n")
    return 0


def _text(found: dict[str, Any]) -> str:
    lines = [f"{name:13} {'-' if version is None else version}" for name, version in found["versions"].items()]
    for device in found["devices"]:
        details = [device["name"]]
        if device["memory_bytes"] is not None:
            details.append(f"{device['memory_bytes'] / GIBI:.1f} GiB")
        if device["capability"] is not None:
            details.append(f"capability {device['capability']}")
        if "threads" in device:
            cores = "" if device["cores"] is None else f"{device['cores']} cores, "
            details.append(
                f"{cores}{device['threads']} threads ({device['usable_threads']} usable, torch uses "
                f"{device['torch_threads']})"
            )
        lines.append(f"{device['device']:13} {'; '.join(details)}; decode steps run on {device['backend']!r}")
    others = [f"{name} {one['installed']} ({one['locked']})" for name, one in found["differs_from_lock"].items()]
    lines.append(f"{'other than':13} tested (the locked version in brackets): {', '.join(others) or 'none'}")
    return "\n".join(lines)
