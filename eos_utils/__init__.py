"""Tools to measure the Edge of Stability: curvature, Lanczos, gradient descent along a trajectory, verdicts."""

__version__ = "0.1.0"
