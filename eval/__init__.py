"""Scores encoders and language models: benchmarks, zero-shot, cost, reports. Runs from a checkout."""
