"""Downstream evaluation with lm-eval."""

from harness.evaluation.downstream import check_evaluation, evaluate

__all__ = ["check_evaluation", "evaluate"]
