"""Evaluates a run or a model: loss, perplexity, multiple choice, divergence, cost of merging."""
