"""One rank of a tensor-parallel run: writes the tokens that it generates, or why it cannot, to a file.

Run by torchrun as `tensor_parallel_child.py JOB`, a JSON file with the folders of two models, the prompt and the
settings; rank R writes JOB.R.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import rocketkv


def main(job: Path) -> None:
    """Generate with every method, then patch a model whose KV heads cannot be divided."""
    given: dict[str, Any] = json.loads(job.read_text())
    model = AutoModelForCausalLM.from_pretrained(given["even"], tp_plan="auto")
    found: dict[str, Any] = {"heads": [], "tokens": {}}
    ids = torch.tensor(given["ids"])
    for fields in given["settings"]:
        with rocketkv.patch(model, **fields) as handle:
            tokens = model.generate(ids, max_new_tokens=12, do_sample=False)
            found["tokens"][fields["method"]] = tokens[:, ids.shape[1] :].tolist()
            found["heads"].append(handle.cache.layers[0].keys.shape[1])
    uneven = AutoModelForCausalLM.from_pretrained(given["uneven"], tp_plan="auto")
    try:
        rocketkv.patch(uneven)
    except ValueError as error:
        found["error"] = str(error)
    Path(f"{job}.{dist.get_rank()}").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
