"""The same code on a CUDA device. These tests need one."""

import pytest
import torch

from harness.runs.directory import METRICS
from tests.tiny_run import lines, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "cell",
    [
        "algorithm=gspo model=tiny_dense",
        "algorithm=ppo model=tiny_moe",
        "algorithm=grpo_routing_replay model=tiny_moe",
        "algorithm=grpo_rollout_routing_replay model=tiny_moe",
    ],
)
def test_a_run_on_the_gpu_is_done_and_its_sampler_and_trainer_agree(cold_starts, tmp_path, cell):
    directory = run(tmp_path, "device=cuda", *cell.split())
    rows = lines(directory, METRICS)
    assert len(rows) == 2
    assert all(row["mismatch/logprob_abs_mean"] < 0.05 for row in rows)  # bfloat16 keeps two to three digits
