"""Puts encoders into language models: towers for LLaVA and transformers, tuning, chat, lmms-eval."""
