"""Downstream evaluation with lm-eval."""

from harness.evaluation.downstream import check_evaluation, evaluate, prepare_evaluation
from harness.evaluation.shared import shared_scores

__all__ = ["check_evaluation", "evaluate", "prepare_evaluation", "shared_scores"]
