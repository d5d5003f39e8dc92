"""Evaluation: bits per byte, baselines, sampling."""
