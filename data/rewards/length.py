"""Reward of an answer by its length: 0 at TARGET tokens, -1 at none or at twice as many.

python train.py ... stage=ppo reward_file=data/rewards/length.py
"""

TARGET = 16  # tokens, the one that ends the answer included


def near_target(completions, completion_ids):
    return [-abs(len(ids) - TARGET) / TARGET for ids in completion_ids]
