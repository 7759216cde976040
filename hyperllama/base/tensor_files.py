"""Reading safetensors files that may be damaged, or made to do harm: whole, of the right shapes and finite, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hyperllama.base.distributed import gathered
from hyperllama.errors import UserError, in_one_line

HEADER_BYTES = 2**24  # far more than any of our headers, far less than would fill the memory when it is parsed


def read_tensors(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file by name, on the CPU, and the texts of its header.

    Raises UserError, with `what` it should be, if the file is missing, not whole, its header is larger than `HEADER_BYTES`, or
    a tensor has a number that is not finite. Takes no more memory than the file has bytes, and a header's.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {what}")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > HEADER_BYTES:
            raise UserError(f"{path}: not {what}: its header would have {header:,} bytes; copy it again, or make it again")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not {what} ({in_one_line(error)}); copy it again, or make it again") from error
    for name, tensor in tensors.items():
        numbers = tensor if tensor.element_size() > 1 else tensor.float()  # torch has no isfinite for 8 bits
        if tensor.is_floating_point() and not numbers.isfinite().all():
            raise UserError(f"{path}: {name} has numbers that are not finite; make it again")
    return tensors, metadata


def load_parameters(
    path: str | Path, parameters: Mapping[str, Tensor], what: str, *, optional: Sequence[str] = ()
) -> dict[str, str]:
    """Give parameters the values of a file's tensors of the same names; returns the texts of the file's header.

    Raises UserError, and changes nothing, unless the file is whole and has a tensor of the right shape for each of them;
    `optional` ones keep their values where it has none. Other tensors in it are left alone.
    """
    tensors, metadata = read_tensors(path, what)
    for name, parameter in parameters.items():
        if name not in tensors and name in optional:
            continue
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        with gathered([parameter]):
            wanted = tuple(parameter.shape)
        if found != wanted:
            raise UserError(f"{path}: {name} is {found}, not {wanted}; these are weights of another base or other settings")
    for name, parameter in parameters.items():
        if name in tensors:
            with torch.no_grad(), gathered([parameter], writing=True):
                parameter.copy_(tensors[name])
    return metadata
