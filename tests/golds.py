"""Functions as users give them with --gold_function."""

import random

import torch

NOT_A_FUNCTION = 3
asked: list[tuple[str, str]] = []  # what `judge` was asked


def judge(prompt: str, response: str) -> float:
    """Depends on both texts, and draws random numbers as somebody's verifier may: the run must not notice."""
    asked.append((prompt, response))
    random.random(), torch.rand(3)
    return verdict(prompt, response)


def verdict(prompt: str, response: str) -> float:
    return len(prompt) + len(response) / 100


def is_long(prompt: str, response: str) -> bool:
    return len(response) > 10


def infinite(prompt: str, response: str) -> float:
    return float("inf")


def not_a_number(prompt: str, response: str) -> float:
    return float("nan")


def too_large(prompt: str, response: str) -> float:
    return 1e39  # of float32


def without_number(prompt: str, response: str) -> None:
    return None


def without_empty_replies(prompt: str, response: str) -> int:
    return len(prompt) // len(response)


def fails_later(prompt: str, response: str) -> float:
    """Does well as long as nobody really answers."""
    if response:
        raise LookupError("no verdict\non this one")
    return 0.0
