"""One step's gradients on all CPUs: rows are dealt to threads, each computing alone, and gradients are added in order.

fp32 matrix products go through OpenBLAS, which gets one thread on few CPUs because its threads spin while they wait
for each other (see cpus.py). Threads of ours meet once a step instead of once a product. The order of the additions
is fixed, so equal inputs give equal gradients, bit for bit, on the same number of CPUs.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import nn

from slmops_trainer import cpus

SMALL = 256 << 20  # bytes of gradients, which may be held twice as often
Part = Callable[[int], torch.Tensor]  # the loss of one share of the rows, by its number


def count(model: nn.Module, *, bf16: bool) -> int:
    """Shares to deal a batch into.

    One where the device or the library is parallel by itself, or where randoms are drawn: threads would draw them in
    any order.
    """
    threads = torch.get_num_threads()
    alone = next(model.parameters()).device.type != "cpu" or bf16 or threads > cpus.FEW
    return 1 if alone or draws(model) else threads


def draws(model: nn.Module) -> bool:
    """Whether a forward pass in training draws random numbers, by dropout layers or by the configuration's rates."""
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    config = getattr(model, "config", None)
    rates = config.to_dict() if config is not None else {}
    return layers or any(
        isinstance(value, float) and value > 0 and ("dropout" in name or "pdrop" in name)
        for name, value in rates.items()
    )


def deal(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of the rows of each share, at most `most` shares, for rows of `lengths` tokens.

    Rows of like lengths go together, since a share is padded to its longest: fewer long ones, more short ones, so that
    the share with the most tokens, padding counted, has as few as can be; the others wait for it.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def within(tokens: int) -> list[list[int]]:
        shares, at = [], 0
        while at < len(order):
            size = max(1, tokens // lengths[order[at]])
            shares.append(order[at : at + size])
            at += size
        return shares

    whole = len(lengths) * lengths[order[0]]
    return within(bisect_left(range(whole), True, key=lambda tokens: len(within(tokens)) <= most))


class Shards:
    """`count` threads that add their shares' gradients to the parameters'.

    most: shares to deal a batch into. Two for each thread waste less on padding than one, and a thread that is held up
    leaves the next share to the others; but each share holds gradients of its own until they are added.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], count: int) -> None:
        self.parameters = parameters
        held = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        self.most = 2 * count if count > 1 and held <= SMALL else count
        self.pool: ThreadPoolExecutor | None = None
        if count == 1:  # the calling thread does it
            return
        threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(count, "shard", initializer=lambda: torch.set_num_threads(1))
        ready = Barrier(count)  # so that all of them start now
        list(self.pool.map(lambda _: ready.wait(), range(count)))
        torch.set_num_threads(threads)  # the call above sets what later threads begin with, too

    def backward(self, loss: Part, shares: int) -> float:
        """Add the gradients of loss(0) + ... + loss(shares - 1) to the parameters' `grad`; returns the sum."""
        if self.pool is None or shares == 1:
            whole = loss(0)
            whole.backward()
            return float(whole.detach())

        def one(share: int) -> tuple[float, tuple[torch.Tensor | None, ...]]:
            part = loss(share)
            return float(part.detach()), torch.autograd.grad(part, self.parameters, allow_unused=True)

        total = 0.0
        for value, gradients in self.pool.map(one, range(shares)):
            total += value
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None and parameter.grad is not None:
                    parameter.grad.add_(gradient)
                elif gradient is not None:
                    parameter.grad = _laid_out(gradient, parameter)
        return total

    def close(self) -> None:
        """End the threads."""
        if self.pool is not None:
            self.pool.shutdown()


def _laid_out(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The gradient with its numbers in the parameter's order: the optimizer's fused kernel reads both as they lie.

    An adapter of an embedding has one that is transposed, which `backward` would have copied, too.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
