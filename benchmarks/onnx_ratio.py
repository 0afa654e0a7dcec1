"""What a student's file saves beside its teacher's own ONNX file: size and time in one runtime.

Both run in onnxruntime on one thread, in turns, batches of 1 and of 64; the teacher is written in
float by the same exporter. So the ratio is that of the nets and their whole numbers, not that of
two runtimes.

    python benchmarks/onnx_ratio.py TEACHER FILE --data digits
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from _table import table

import attar
from attar.evaluation.cost import costs
from attar.exporting import export
from attar.exporting.artefact import Runner


def session(path: Path) -> Runner:
    """A file as what it answers to a batch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    held = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = held.get_inputs()[0].name

    def run(inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(held.run(None, {name: inputs.numpy()})[0]))

    return Runner(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="the folder of a saved model")
    parser.add_argument("file", type=Path, help="an exported .onnx file")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    test = getattr(attar.data, given.data)()[-1]
    inputs = test.rows(torch.arange(64))["inputs"]
    with tempfile.TemporaryDirectory() as place:
        made = export(
            attar.models.load(given.teacher), Path(place) / "t", example=inputs, formats=["onnx"]
        )
        files = {"teacher": made["onnx"].path, "student": given.file}
        found = costs({name: session(path) for name, path in files.items()}, inputs, device="cpu")
        sizes = {name: path.stat().st_size for name, path in files.items()}
    told = {
        name: {
            "bytes": sizes[name],
            **{f"ms for {b}": found[name].latency[b]["p50_ms"] for b in ("1", "64")},
        }
        for name in files
    }
    ratio = {key: told["teacher"][key] / told["student"][key] for key in told["teacher"]}
    lines = [
        [name, f"{row['bytes']:,}", f"{row['ms for 1']:.3f}", f"{row['ms for 64']:.2f}"]
        for name, row in told.items()
    ]
    lines.append(["ratio", *(f"{value:.1f}" for value in ratio.values())])
    print(table(["in onnxruntime", "bytes", "1 example, ms", "64 examples, ms"], lines))
    if given.json:
        given.json.write_text(json.dumps(told | {"ratio": ratio}, indent=1) + "\n")


if __name__ == "__main__":
    main()
