"""Flows from noise to mel: time, solvers, gradients, noise, and the protocol of a policy."""
