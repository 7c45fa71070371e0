"""The thing being compared: small pure functions on tensors, joined by configuration."""
