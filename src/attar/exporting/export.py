"""`export`: write a module in formats that others read, after each was run against it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from annotated_types import Ge
from safetensors.torch import load_file
from torch import Tensor, nn

from attar.data import Source
from attar.evaluation.numbers import is_share
from attar.evaluation.rows import evaluating
from attar.exporting.artefact import Artefact, Run, largest_difference, latency, likeness, lost
from attar.exporting.card import LICENCES, Card, card_text, check_card
from attar.exporting.int8 import FORMAT, check_int8, int8_bytes
from attar.exporting.onnx import check_onnx, onnx_bytes, onnx_run
from attar.exporting.tokens import Example, asked, examples_of, fewer, reads_tokens
from attar.exporting.tracing import Graph, pt2_bytes, pt2_run, traced
from attar.models import load, merged, save
from attar.models.changed import builders, noted
from attar.models.quantized import frozen
from attar.runtime import UsageError, first_line, suggest, write_atomic
from attar.runtime.files import at_work, make_folder, remove, sync_folder
from attar.tasks import LanguageModelling, Task

Format = Literal["safetensors", "onnx", "onnx_int8", "torch_export"]

FILES = {
    "safetensors": "model.safetensors",
    "onnx": "model.onnx",
    "onnx_int8": "model.int8.onnx",
    "torch_export": "model.pt2",
}
README = "README.md"
FOREIGN = {"config.json", "preprocessor_config.json"}  # by which transformers reads the folder
WRITTEN = {*FILES.values(), "model.json", README, *FOREIGN}
GRAPHS = {"onnx", "torch_export"}  # written from one traced program

Drop = Annotated[float, Ge(0)]


def export(
    module: nn.Module,
    folder: str | Path,
    *,
    example: Example,
    formats: Sequence[Format] = ("safetensors",),
    task: Task | None = None,
    card: Card | None = None,
    licence: str | None = None,
    teacher_licence: str | None = None,
    data_licence: str | None = None,
    calibration: Example | None = None,
    skip: Sequence[str] = (),
    drop: Drop | None = None,
    test: Source | None = None,
) -> dict[str, Artefact]:
    """Write *module* into *folder* in each of *formats*, with a model card.

    - ``safetensors``: ``model.safetensors`` and ``model.json``, as ``attar.models.save``; of a
      model of transformers ``config.json`` too;
    - ``onnx``: ``model.onnx``, one file, any batch size, opset 20 (needs ``attar[onnx]``);
    - ``onnx_int8``: ``model.int8.onnx``, the same of whole numbers (QDQ): a float model is
      rounded by onnxruntime to the ranges that *calibration* shows, each output channel for
      itself; a model of ``attar.quantize(mode="learn")`` as it learned to be;
    - ``torch_export``: ``model.pt2`` of ``torch.export``, any batch size.

    Of a model of tokens [n, S] these two read any length too; texts have a second input,
    ``attention`` [n, S], 1 at each real token. A language model reads a document a row and no
    positions. Adapters of peft are merged into the weights (`attar.models.merged`).

    Every file is run against the module before the folder appears, in eval mode on the CPU, on
    up to 256 examples and on one alone: no output may differ by more than 1e-4, and the largest
    output of each example must be the same one (not asked of a regression, nor of a language
    model, whose 1e-4 is of its largest logit). A file of whole numbers cannot be so near: how
    near it is, and how often its largest output is the same, is told. All formats are written,
    or none.

    Args:
        module: reads one tensor [n, ...] and returns one, in float32 or float64; or a model of
            tokens, as its task calls it. It comes back as it was: mode, device, weights.
        folder: new or empty, or an earlier export, which is replaced as a whole.
        example: [n, ...], real inputs, n at least 1; of texts a batch with ``inputs`` and
            ``attention``. None of it is written to any file.
        task: which of a model's outputs is asked for, where it reads tokens; told in the card and
            kept with the weights.
        card: what it tells beside the licences, see ``Card``.
        licence, teacher_licence, data_licence: told in the card; "not stated" when left out.
        calibration: for ``onnx_int8`` of a float model: like *example*, but of the training data.
        skip: for the same: patterns of layers that stay float.
        drop: how much of the task's metric ``onnx_int8`` may lose on *test*, such as 0.01 of an
            accuracy. A file that loses more is written all the same, and says so: ``lost.missed``.
        test: what that is measured on; without *drop* it is measured all the same.

    Returns:
        by format, what was written and seen.

    Raises:
        UsageError: an unknown format or field, a missing library, a folder with other files, a
            module that cannot be said in a format; a layer that would stay float in
            ``onnx_int8`` and is not in *skip*.
        DataError: a file does not answer as the module does.
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile wrapped
    told: Mapping[str, Any] = card or {}
    named = dict(zip(LICENCES, (licence, teacher_licence, data_licence), strict=True))
    licences = {name: text for name, text in named.items() if text is not None}
    target = Path(folder)
    _check_formats(formats, module)
    check_int8(formats, module, calibration is not None)
    _check_drop(drop, formats, task)
    _check_test(drop, test, task)
    check_card(told, licences)
    examples = examples_of(example)
    ranges = None if calibration is None else examples_of(calibration, "calibration")
    _check_folder(target)
    with evaluating(module, torch.device("cpu")), _draft_of(target) as draft:
        original = asked(module, examples, task)
        few = 1 if reads_tokens(examples) else len(examples[0])  # logits of tokens are many
        outputs = _outputs(original, tuple(each[:few] for each in examples))
        examples = fewer(examples, outputs)
        module = _as_kept(module)
        runs = _written(module, draft, formats, task, examples, (ranges, skip))
        ordered = (task is None or task.competing) and not isinstance(task, LanguageModelling)
        made = [
            _artefact(name, draft, target, run, original, examples, ordered)
            for name, run in runs.items()
        ]
        if test is not None and task is not None:
            made = [
                replace(each, lost=lost(runs[FORMAT], original, test, task, drop))
                if each.format == FORMAT
                else each
                for each in made
            ]
        text = card_text(told, licences, module, task, examples, outputs, made)
        write_atomic(draft / README, text.encode())
    return {artefact.format: artefact for artefact in made}


def check_export(
    module: nn.Module,
    *,
    example: Example,
    formats: Sequence[Format],
    task: Task | None = None,
    skip: Sequence[str] = (),
    drop: Drop | None = None,
) -> None:
    """Refuse what `export` would refuse, before the module is trained; nothing is written.

    Args:
        module, example, formats, task, skip, drop: as in ``export``; the weights may be random.

    Raises:
        UsageError: an unknown format, a missing library, a drop that nothing is judged by, or a
            module that cannot be said in a format.
    """
    _check_formats(formats, module)
    _check_drop(drop, formats, task)
    check_int8(formats, module, calibrated=True)
    examples = examples_of(example)
    with evaluating(module, torch.device("cpu")):
        _outputs(asked(module, examples, task), examples)
        whole = asked(_as_kept(module), examples, task)
        graph = traced(whole, examples) if set(formats) & GRAPHS else None
        if graph is not None and "onnx" in formats:
            onnx_bytes(graph)
        if FORMAT in formats:
            int8_bytes(_as_kept(module), task, examples, examples, skip)


def _check_formats(formats: Sequence[str], module: nn.Module) -> None:
    known = get_args(Format)
    if isinstance(formats, str) or not formats or len(set(formats)) < len(formats):
        raise UsageError(
            f"formats is {formats!r}; give a list, each format once, of: {', '.join(known)}"
        )
    for name in formats:
        if name not in known:
            raise UsageError(f"there is no format '{name}'; {suggest(str(name), known)}")
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            raise UsageError(
                f"'{key}' is {tensor.dtype}, and only float32 and float64 are exported; call "
                "module.float() first"
            )
    if {"onnx", FORMAT} & set(formats):
        check_onnx(module)


def _check_test(drop: Any, test: Any, task: Task | None) -> None:
    if (drop is not None and test is None) or (test is not None and task is None):
        raise UsageError(
            "drop needs test and task: how much the int8 file may lose, on which examples, and by "
            "whose metric"
        )


def _check_drop(drop: Any, formats: Sequence[str], task: Task | None) -> None:
    if drop is None:
        return
    if FORMAT not in formats:
        raise UsageError(f"drop is what the format {FORMAT} may lose; add it to formats")
    if not (type(drop) in (int, float) and 0 <= drop < float("inf")):
        raise UsageError(f"drop is a number from 0 on, such as 0.01, not {drop!r}")
    if task is not None and is_share(task.metric) and drop >= 1:
        raise UsageError(
            f"drop is {drop:g}, and {task.metric} is at most 1: a file could lose all of it; give "
            "a share such as 0.01"
        )


def _as_kept(module: nn.Module) -> nn.Module:
    """*module* with all that is put on its weights in them, and with whole numbers where it has
    learned to have them.
    """
    whole = merged(module)
    made = frozen(whole)
    return made if made is whole else noted(made, whole)


def _outputs(module: nn.Module, examples: tuple[Tensor, ...]) -> Tensor:
    try:
        outputs = module(*examples)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        said = first_line(error)
        raise UsageError(
            f"the module cannot read the example {list(examples[0].shape)}: {said:.300}"
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim < 1 or len(outputs) != len(examples[0]):
        raise UsageError(
            f"the module returns a {type(outputs).__name__}, but what is exported returns one "
            "tensor [n, ...]; wrap it in a module that returns its main output"
        )
    return outputs


def _written(
    module: nn.Module,
    draft: Path,
    formats: Sequence[str],
    task: Task | None,
    examples: tuple[Tensor, ...],
    rounding: tuple[tuple[Tensor, ...] | None, Sequence[str]],
) -> dict[str, Run]:
    """Write every file into *draft*; what each answers when it is read back.

    Args:
        rounding: examples for the ranges of whole numbers, and the layers that stay float.
    """
    runs: dict[str, Run] = {}
    graphs: dict[str, tuple[Callable[[Graph], bytes], Callable[[bytes], Run]]]
    graphs = {"onnx": (onnx_bytes, onnx_run), "torch_export": (pt2_bytes, pt2_run)}
    whole = asked(module, examples, task)
    graph = traced(whole, examples) if GRAPHS & set(formats) else None
    for name in formats:
        if name == "safetensors":
            save(module, draft, extra={"task": task.describe()} if task else None)
            runs[name] = _safetensors_run(module, draft, examples, task)
            continue
        if name == FORMAT:
            data = int8_bytes(module, task, examples, *rounding)
            write_atomic(draft / FILES[name], data)
            runs[name] = onnx_run(data)
            continue
        assert graph is not None
        to_bytes, run_of = graphs[name]
        data = to_bytes(graph)
        write_atomic(draft / FILES[name], data)
        runs[name] = run_of(data)  # the bytes in hand, not a file that another could change
    return runs


def _safetensors_run(
    module: nn.Module, folder: Path, examples: tuple[Tensor, ...], task: Task | None
) -> Run:
    if getattr(module, "attar_build", {}).get("family") in builders():
        return asked(load(folder), examples, task)
    weights = load_file(folder / FILES["safetensors"])
    whole = asked(module, examples, task)
    if whole is not module:
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
    return lambda *inputs: torch.func.functional_call(whole, weights, inputs)


def _artefact(
    name: str,
    draft: Path,
    target: Path,
    run: Run,
    module: nn.Module,
    examples: tuple[Tensor, ...],
    ordered: bool,
) -> Artefact:
    data = (draft / FILES[name]).read_bytes()
    agreement = None
    if name == FORMAT:
        difference, agreement = likeness(FILES[name], run, module, examples, ordered=ordered)
    else:
        difference = largest_difference(FILES[name], run, module, examples, ordered=ordered)
    times, threads = latency(run, examples)
    return Artefact(
        format=name,
        path=target / FILES[name],
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        difference=difference,
        examples=len(examples[0]),
        latency=times,
        threads=threads,
        agreement=agreement,
    )


# ---------------------------------------------------------------- the folder


def _check_folder(target: Path) -> None:
    """Only what an export wrote is ever replaced."""
    if target.is_symlink():
        raise UsageError(f"{target}: is a symbolic link, which is not followed; name a folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target}: is a file, but a model is exported into a folder")
    known = WRITTEN if (target / README).is_file() else WRITTEN - FOREIGN
    with os.scandir(target) as entries:
        for entry in entries:
            if entry.name not in known or not entry.is_file(follow_symlinks=False):
                raise UsageError(
                    f"{target}: holds '{entry.name[:80]}', which no export wrote; choose a new "
                    "folder"
                )


@contextmanager
def _draft_of(target: Path) -> Iterator[Path]:
    """A folder beside *target* that takes its place at the end, and is gone after an error."""
    target = target.absolute()
    make_folder(target.parent)
    _sweep(target)
    draft = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    os.mkdir(draft)
    try:
        yield draft
        sync_folder(draft)
        _check_folder(target)  # again: making the files took time
        _replace(draft, target)
    except BaseException:
        with suppress(OSError):
            remove(draft)
        raise


def _sweep(target: Path) -> None:
    """Tidy up after processes that are no more: drop drafts, put back what was put aside."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(tmp|old)-([0-9]{{1,18}})")
    for entry in os.listdir(target.parent):
        match = pattern.fullmatch(entry)
        if not match or at_work(int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            os.rename(target.parent / entry, target)
        else:
            remove(target.parent / entry)


def _replace(draft: Path, target: Path) -> None:
    """Give *draft* the name *target*; what had it is put aside first and removed at the end."""
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    held = target.exists()
    if held:
        os.rename(target, aside)
    try:
        os.rename(draft, target)
    except OSError:
        if held:
            os.rename(aside, target)
        raise
    sync_folder(target.parent)
    if held:
        remove(aside)
