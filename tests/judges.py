"""Functions as users give them with --reward_function; those in the first part are in the forms of TRL's documentation."""

import re

# ---- As for trl.GRPOTrainer ----


def reward_len(completions, **kwargs):
    return [-abs(20 - len(completion)) for completion in completions]


def reward_tokens(prompts, completions, completion_ids, **kwargs):
    """The first one that its page shows: longer completions in tokens."""
    return [float(len(ids)) for ids in completion_ids]


def format_reward(completions, **kwargs):
    """Reward of a form, of dialogues."""
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think><answer>.*?</answer>$", content) else 0.0 for content in contents]


def boxed_reward(completions, ground_truth, **kwargs):
    """A column with the right answer."""
    matches = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    contents = [match.group(1) if match else "" for match in matches]
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth, strict=True)]


def math_reward(prompts, completions, task, **kwargs):
    """Several tasks in one data set: None where this one is not meant."""
    return [(1.0 if "4" in completion else 0.0) if t == "math" else None for completion, t in zip(completions, task)]  # noqa: B905


async def slow_reward(prompts, completions, **kwargs):
    """A function that waits for a server."""
    return [float(len(completion)) for completion in completions]


def scheduled_reward(completions, trainer_state, **kwargs):
    """Another rule late in a run than early."""
    return [float(trainer_state.global_step)] * len(completions)


def noting_reward(prompts, completions, answer, log_extra, log_metric, **kwargs):
    right = [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]
    log_extra("wanted", list(answer))
    log_metric("accuracy", sum(right) / len(right))
    return right


# ---- One reply at a time ----


def starts_with(prompt, response, answer):
    return response.startswith(answer)


def length(prompt, response):
    return len(response)


def some_lengths(prompt, response):
    return len(response) if len(prompt) > 5 else None


def never(prompt, response):
    return None


# ---- Wrong ones ----


def too_few(completions, **kwargs):
    return [0.0] * (len(completions) - 1)


def no_list(completions, **kwargs):
    return 1.0


def fails_on_dogs(prompts, completions, **kwargs):
    if "dogs" in prompts and any(completions):
        raise LookupError("no verdict\non this one")
    return [0.0] * len(completions)


def nan_on_dogs(prompts, completions, **kwargs):
    return [float("nan") if prompt == "dogs" else 0.0 for prompt in prompts]


def two_numbers(completions, **kwargs):
    import torch

    return torch.zeros(len(completions), 2)


def needs_a_solution(completions, solution):
    return [0.0] * len(completions)
