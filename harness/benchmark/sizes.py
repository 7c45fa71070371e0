"""How large the measured work is: the sizes that are reported, and ones that only try everything out."""

from dataclasses import dataclass

# An end-of-sequence token that no vocabulary has: all completions get the full length.
NO_TOKEN = 1_000_000


@dataclass(frozen=True)
class Sizes:
    """The work of the tables on the CPU."""

    overrides: tuple[str, ...]  # Hydra overrides of the embedded models and their task
    completions: int  # in a rollout batch
    batches: int  # rollout batches of one measurement
    tokens: int  # of the log-probability table
    vocabulary: int
    hidden: int
    matrix: int  # the largest side of the square matrices whose product is the peak
    sequences: tuple[int, ...]  # growth with the tokens of an update
    group_sizes: tuple[int, ...]  # growth with the group size
    lengths: tuple[int, ...]  # growth with the sequence length, the prompt included
    seeds: int  # of the sweep that is reported on; eight runs each
    steps: int  # of each of its runs


FULL = Sizes(
    overrides=(),
    completions=256,
    batches=3,
    tokens=8 * 1024,
    vocabulary=151_936,
    hidden=1024,
    matrix=2048,
    sequences=(64, 128, 256, 512),
    group_sizes=(8, 16, 32, 64),
    lengths=(64, 128, 256, 512),
    seeds=25,
    steps=500,
)
TINY = Sizes(
    overrides=(
        "model.cold_start.steps=2",
        "model.cold_start.batch_size=4",
        "task.max_completion_tokens=8",
    ),
    completions=16,
    batches=1,
    tokens=64,
    vocabulary=512,
    hidden=16,
    matrix=64,
    sequences=(8, 16),
    group_sizes=(2, 4),
    lengths=(16, 32),
    seeds=3,
    steps=5,
)
