"""Reward for problems with one right answer, such as GSM8K's: 1 if the text ends with the row's own answer,
else 0.

    python train.py configs/grpo_lora.yaml reward_file=data/rewards/maths.py

Where the answer stands in a text ("#### 42", "\\boxed{42}", <answer>42</answer>, "the answer is 42", the last
number) and when two are the same (1,000 = 1000.0, 1/2 = 0.5) is written in answers.py.
"""

from evaluation.answers import same_answer


def exact_match(completions, answers):
    return [
        float(answer is not None and same_answer(text, answer)) for text, answer in zip(completions, answers)
    ]
