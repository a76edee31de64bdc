"""Write docs/architectures.md: a taught model of every architecture, aligned end to end.

    python benchmarks/architectures.py

The models are those of tests/architectures.py, and tests/test_architectures.py checks the page against them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

HEAD = """# Architectures

Made by `python benchmarks/architectures.py`. For each row a model of 3 or 4 blocks, 32 wide, is trained for seconds to
answer and refuse for the wrong reason, then aligned under the defaults for at most 6 iterations. Its tests
(`tests/test_architectures.py`) also prove that the edit by hook, baked, as a merged checkpoint and, where the table
says so, as a LoRA adapter loaded by PEFT gives the same logits to 1e-4.

F1 that stays as it was means that no iteration was better on validation prompts: the run kept the untouched model. That
says something about so small a model and so short a schooling, not about the architecture at its real size.

| model_type | edited modules | F1 before | F1 after | LoRA |
| --- | --- | --- | --- | --- |
"""


def _shown(f1: float | None) -> str:
    return "not taught" if f1 is None else f"{f1:.3f}"


def main() -> None:
    import torch

    from architectures import ARCHITECTURES, tiny
    from llmva.cli.inputs import quiet_libraries
    from llmva.models.sublayers import find_decoder
    from test_architectures import SLOW, aligned, expressible

    quiet_libraries()
    torch.set_num_threads(1)
    text = HEAD
    for row in ARCHITECTURES:
        model = tiny(row)
        lora = expressible(model)
        names = find_decoder(model).names
        ends = dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name in names)
        before, after = (None, None) if row in SLOW else aligned(row)
        kinds = ", ".join(f"`{end}`" for end in ends)
        text += f"| {row} | {kinds} | {_shown(before)} | {_shown(after)} | {'yes' if lora else 'no: fused experts'} |\n"
        print(text.splitlines()[-1], flush=True)
    (ROOT / "docs" / "architectures.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
