"""Downstream evaluation with lm-eval."""

from harness.evaluation.downstream import check_evaluation, evaluate, prepare_evaluation

__all__ = ["check_evaluation", "evaluate", "prepare_evaluation"]
