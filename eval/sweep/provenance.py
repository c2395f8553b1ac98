"""Code, versions, hardware and weights of a run."""

from __future__ import annotations

import functools
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..._version import __version__
from ...environment import environment, processor
from ...hf.tensorfile import weights_digest
from ..records import ProvenanceDict


def weights_mark(model: PreTrainedModel) -> str:
    """Return what identifies a model's weights: the commit of the hub, or else a digest of some of their numbers.

    Under tensor parallel every rank must call this.

    A digest ends with the kind of the quantization, whose packed numbers it does not read.
    """
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)
    quantized: Any = getattr(model.config, "quantization_config", None)
    if quantized is None:
        return weights_digest(model, gathered=True)[:16]
    settings = quantized if isinstance(quantized, dict) else quantized.to_dict()
    kind = getattr(settings.get("quant_method"), "value", settings.get("quant_method"))
    return f"{weights_digest(model)[:16]} {kind}"


def provenance(model: PreTrainedModel) -> ProvenanceDict:
    """Return code, versions and hardware of this process."""
    name, cores = processor()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = environment()["versions"]
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "rocketkv": __version__,
        "git_hash": git_hash(),
        "versions": {name: found for name, found in versions.items() if found is not None and name != "platform"},
        "hardware": {
            "processor": name,
            "cores": cores,
            "threads": torch.get_num_threads(),
            "devices": devices,
            "device": str(model.device),
            "attention": model.config._attn_implementation,
            "ranks": getattr(model, "tp_size", None),  # of tensor parallel
            "model_revision": getattr(model.config, "_commit_hash", None),
        },
    }


@functools.cache
def git_hash() -> str | None:
    """Return the commit of the checkout that this library runs from, with `-dirty` where it has changes; or None."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "pyproject.toml").exists():
        return None  # installed: a repository around it is another project's
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip() or None
