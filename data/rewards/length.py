"""Reward of an answer by its length: 0 at TARGET tokens, -1 at none or at twice as many.

    reward_file: data/rewards/length.py
"""

TARGET = 40  # tokens, the one that ends the answer included


def near_target(completion_ids, completions):
    return [-abs(len(ids) - TARGET) / TARGET for ids in completion_ids]
