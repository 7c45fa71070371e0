"""How fast the harness is, side by side with what others use for the same work: `scripts/benchmark`."""
