"""Towers compared alike: same language model, same projector, same batches, same steps."""
