"""The encoder alone, without a language model: classification, neighbours, probe, retrieval, agreement."""
