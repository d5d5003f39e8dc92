"""Engines: ways to evaluate a population. All give the same bits."""
