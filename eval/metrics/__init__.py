"""Scoring rules, each equal to its official scorer."""
