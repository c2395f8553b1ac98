"""`python -m studies NAME [options]` runs a study; `python -m studies` lists them."""

import importlib
import sys
from pathlib import Path

STUDIES = {
    "ablation": ("ablation.command", "rocketkv+ part by part, at equal bytes read"),
    "long_output": ("long_output", "bounded decoding: KL by capacity, and whether its steps stay as quick"),
    "questions": ("questions", "many questions on one context: rollback against new caches"),
    "recall": ("recall", "needles by budget: each prompt is read once, and asked for by every method"),
    "retention": ("retention", "what a conversation about one document still knows of it, turn by turn"),
    "telemetry": ("telemetry", "how well a step's own estimates rank its true errors"),
}


def main(argv: list[str]) -> int:
    """Run the study that is named first, with the other arguments; returns its exit code."""
    if not argv or argv[0] not in STUDIES:
        names = "\n".join(f"  {name:13}{summary}" for name, (_, summary) in STUDIES.items())
        print(f"usage: python -m studies NAME [options]\n\n{names}", file=sys.stdout if not argv else sys.stderr)
        return 2 if argv else 0
    study = importlib.import_module(f".{STUDIES[argv[0]][0]}", __package__)
    return int(study.main(argv[1:]))


if __name__ == "__main__":
    # `-m` puts the folder of the checkout on the path, where kernels/ hides a package of that name.
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    sys.exit(main(sys.argv[1:]))
