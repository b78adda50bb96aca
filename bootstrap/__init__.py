"""Makes encoders: frozen teacher, pictures, objectives, the training loop. Runs from a checkout."""
