"""Frozen vision transformers of three libraries behind one face."""
