"""State dicts: the usual files are loaded; where there is none, sane random values are drawn."""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.errors import WeightsError
from models.googlenet import GoogLeNet

__all__ = ["initialise", "load_weights", "read_plain", "read_state_dict", "settle_norms"]

_WRAPPERS = ("state_dict", "model", "net")
_PREFIX = "module."
# What torch.load raises over files that are damaged or no state dict; it has no error of its own.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)
_NAMED = 3  # keys that a message names; the rest are counted


def _is_state_dict(candidate: object) -> bool:
    return (
        isinstance(candidate, Mapping)
        and bool(candidate)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in candidate.items())
    )


def read_plain(path: Path, device: torch.device | str = "cpu") -> object:
    """Read what `torch.save` wrote, if it is tensors and plain containers; no code of it is run.

    Raises
    ------
    WeightsError
        Where the file cannot be read, or holds anything else.
    """
    try:
        with warnings.catch_warnings():
            # A file of another pickle protocol is read all the same, or ends in the error below.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            content: object = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read: {error.strerror or error}; give the file of a state dict"
        ) from error
    except _UNREADABLE as error:
        raise WeightsError(
            f"{path} is not a file of plain tensors; "
            "write it with torch.save(net.state_dict(), file)"
        ) from error
    return content


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running any code from the file.

    The dict may lie bare in the file or under `state_dict`, `model` or `net`; the prefix `module.`,
    which data-parallel training puts before every name, is taken off.

    Parameters
    ----------
    path : Path
        File that `torch.save` wrote.

    Returns
    -------
    dict of str to Tensor
        On the CPU.

    Raises
    ------
    WeightsError
        Where the file cannot be read, holds anything but tensors and plain containers, or holds
        no state dict.
    """
    content = read_plain(path)
    if isinstance(content, Mapping) and not _is_state_dict(content):
        content = next(
            (content[key] for key in _WRAPPERS if _is_state_dict(content.get(key))), content
        )
    if not isinstance(content, Mapping) or not _is_state_dict(content):
        raise WeightsError(
            f"{path} holds no state dict, bare or under {', '.join(_WRAPPERS)}; "
            "write it with torch.save(net.state_dict(), file)"
        )
    if all(name.startswith(_PREFIX) for name in content):
        return {name.removeprefix(_PREFIX): value for name, value in content.items()}
    return dict(content)


def _named(keys: Iterable[str]) -> str:
    """Return the first few keys, and how many more there are."""
    keys = list(keys)
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a state dict from a file into `net`, in place; every parameter must be there and fit.

    GoogLeNet's auxiliary heads (`aux1`, `aux2`) are passed over.

    Raises
    ------
    WeightsError
        Where the file cannot be read or does not fit the network; the message names the first keys
        at fault.
    """
    given = read_state_dict(path)
    if isinstance(net, GoogLeNet):
        given = {k: v for k, v in given.items() if not k.startswith(("aux1.", "aux2."))}
    wanted = net.state_dict()
    # Files from before torch 0.4.1 lack this counter, which inference does not use; torch adds it.
    missing = [k for k in wanted if k not in given and not k.endswith(".num_batches_tracked")]
    unexpected = [k for k in given if k not in wanted]
    mismatched = [
        f"{k} ({tuple(given[k].shape)} instead of {tuple(wanted[k].shape)})"
        for k in wanted
        if k in given and given[k].shape != wanted[k].shape
    ]
    faults = [
        f"{what} {_named(keys)}"
        for what, keys in (
            ("lacks", missing),
            ("does not know", unexpected),
            ("differs in", mismatched),
        )
        if keys
    ]
    if faults:
        raise WeightsError(
            f"{path} does not fit the network: it {', '.join(faults)}; "
            "name the network and the --classes that it was trained with"
        )
    net.load_state_dict(given)


def initialise(net: nn.Module, seed: int, *, size: int, channels: int = 3) -> None:
    """Draw He's normal values for every Conv and Linear of `net`, in place; BatchNorms follow.

    Each BatchNorm gets the statistics of its inputs on eight smooth random images, so that
    activations neither vanish nor blow up, however deep the network.

    Parameters
    ----------
    net : nn.Module
        (n, channels, size, size) → anything; ends in eval mode.
    seed : int
        Seed of all values that are drawn.
    size, channels : int
        Side, in pixels, and channels of its images.

    Notes
    -----
    He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", arXiv:1502.01852, equation 10.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    coarse = torch.randn(8, channels, 8, 8, generator=generator)
    settle_norms(net, nn.functional.interpolate(coarse, size=(size, size), mode="bilinear"))


def settle_norms(net: nn.Module, *inputs: torch.Tensor) -> None:
    """Give each BatchNorm of `net` the statistics of what it gets on `inputs`; ends in eval mode."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    net.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_parameters()
        norm.momentum = None  # the plain average of what it sees, here one batch
        norm.train()
    with torch.no_grad():
        if norms:
            net(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
