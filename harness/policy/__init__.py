"""The network being trained: loading, cold start, log-probabilities, critic, routing. It knows no algorithm."""
