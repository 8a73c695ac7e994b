"""Baichuan's own layout, converted once to Llama's."""
