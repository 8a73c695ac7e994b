"""A run that loses nothing: the memory plan before it, the trainer, checkpoints, the files that say how it was made."""
