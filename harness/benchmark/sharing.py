"""How much of what sequences begin with alike the passes of an update had in common."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from harness.rollout.batch import Batch
from harness.update import Updater


def watch_passes(updater: Updater) -> list[Batch]:
    """The micro-batches of the updates from now on, as they come; to be emptied by who asks for them."""
    passes: list[Batch] = []
    micro_batches = updater.micro_batches

    def watched(*batch: Any) -> Iterator[Any]:
        for micro, judged in micro_batches(*batch):
            passes.append(micro)
            yield micro, judged

    updater.micro_batches = watched  # type: ignore
    return passes


def distinct(passes: Sequence[Batch]) -> float:
    """The share of distinct tokens, of which one counts once for all sequences of a pass that begin alike up to it."""
    own, every = 0, 0
    for batch in passes:
        first = batch.first
        own += int((first == torch.arange(len(first)).unsqueeze(1)).sum())
        every += int((first >= 0).sum())
    return own / every
