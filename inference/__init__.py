"""Trained models at work: side by side, and on a chat page."""
