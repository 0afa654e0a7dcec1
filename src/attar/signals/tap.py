"""Reads signals out of a pass without changing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attar.runtime import Closing, PreflightError
from attar.signals.address import Address, module_at, parse


class Tap(Closing):
    """Listens to the features and inputs that *addresses* name while ``tap(forward)`` runs.

    Hooks stand from ``open`` to ``close`` and hear nothing outside their own call, so a pass of
    the same model elsewhere costs one test of a flag. A module that is called twice, or returns
    several parts, must be addressed as ``PATH@K`` or ``PATH[KEY]``, and what is changed in place
    after it was heard is refused: to take one silently would be a wrong result.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with Tap(net, ["feature:0"]) as tap:
        ...     out, heard = tap(net, torch.ones(1, 2))
        >>> heard["feature:0"].shape
        torch.Size([1, 3])
    """

    def __init__(self, model: nn.Module, addresses: Sequence[str], whose: str = "model") -> None:
        self._whose = whose
        self._addresses = [parse(address) for address in addresses]
        self._modules = {(a.kind, a.path): module_at(model, a, whose) for a in self._addresses}
        self._heard: dict[tuple[str, str], list[Any]] = {}
        self._handles: list[RemovableHandle] = []
        self._listening = False
        self._versions: list[tuple[Tensor, int, str]] | None = []  # of the first pass alone

    def open(self) -> Self:
        """Place the hooks; once a stage, before the model is compiled."""
        if not self._handles:
            for (kind, path), module in self._modules.items():
                self._handles.append(self._place(kind, path, module))
        return self

    def close(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self.open()

    def __call__(self, forward: Callable[..., Any], *args: Any) -> tuple[Any, dict[str, Tensor]]:
        """Run ``forward(*args)``; return what it returned and the signals by address."""
        if not self._addresses:
            return forward(*args), {}
        for calls in self._heard.values():
            calls.clear()
        self._listening = True
        try:
            out = forward(*args)
        finally:
            self._listening = False
        if self._versions is not None:
            self._check_in_place()
        heard = {a.text: self._pick(a, self._heard[a.kind, a.path]) for a in self._addresses}
        for calls in self._heard.values():
            calls.clear()
        return out, heard

    def _place(self, kind: str, path: str, module: nn.Module) -> RemovableHandle:
        calls = self._heard.setdefault((kind, path), [])

        def hear_output(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._listening:
                calls.append(output)
                if not torch.compiler.is_compiling():
                    self._note(output, path)

        def hear_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._listening:
                calls.append(args[0] if args else next(iter(kwargs.values()), None))

        if kind == "feature":
            return module.register_forward_hook(hear_output)
        return module.register_forward_pre_hook(hear_input, with_kwargs=True)

    def _note(self, output: Any, path: str) -> None:
        if self._versions is None or not isinstance(output, Tensor) or output.is_inference():
            return
        self._versions.append((output, output._version, path))

    def _check_in_place(self) -> None:
        """A tensor that another module overwrites is no longer what its own module returned."""
        noted, self._versions = self._versions or [], None
        for tensor, version, path in noted:
            if tensor._version != version:
                raise PreflightError(
                    f"'feature:{path}': the {self._whose} changes that in place after '{path}' "
                    "returns it (such as ReLU(inplace=True)); name the module that changes it, or "
                    "build it without inplace"
                )

    def _pick(self, address: Address, calls: list[Any]) -> Tensor:
        where = f"'{address.text}': the {self._whose}'s module '{address.path}'"
        if not calls:
            raise PreflightError(f"{where} was not called in this pass; choose one that is")
        if address.call is None and len(calls) > 1:
            raise PreflightError(
                f"{where} was called {len(calls)} times; say which, such as "
                f"{address.kind}:{address.path}@0"
            )
        if (address.call or 0) >= len(calls):
            raise PreflightError(f"{where} was called only {len(calls)} times")
        return _part(calls[address.call or 0], address, where)


def _part(value: Any, address: Address, where: str) -> Tensor:
    if address.key is not None:
        try:
            value = value[address.key]
        except (KeyError, IndexError, TypeError):
            raise PreflightError(f"{where} gives no part [{address.key}]") from None
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        parts = ", ".join(f"[{key}]" for key in value)
    elif isinstance(value, tuple | list):
        parts = ", ".join(f"[{index}]" for index in range(len(value)))
    else:
        raise PreflightError(f"{where} gives a {type(value).__name__}, not a tensor")
    raise PreflightError(f"{where} gives several parts; say which of {parts}")
