"""Two rewards of reasoning models: the right answer, and the form "<think>...</think> <answer>...</answer>".

    python train.py ... stage=grpo reward_file=data/rewards/reasoning.py reward_weights=1.0,0.2

The form is that of DeepSeek-R1 (arXiv 2501.12948, table 1); an answer is compared as answers.py says.
"""

import re

from evaluation.answers import same_answer

FORM = re.compile(
    r"\s*<think>(?:(?!</?think>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*", re.DOTALL
)


def exact_match(completions, answers):
    return [
        float(answer is not None and same_answer(text, answer)) for text, answer in zip(completions, answers)
    ]


def right_form(completions):
    return [float(FORM.fullmatch(text) is not None) for text in completions]
