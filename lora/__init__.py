"""The base model and what is put on it: LoRA adapters, switched and never merged, and heads."""
