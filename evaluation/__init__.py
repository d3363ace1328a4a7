"""Measures of generated texts as pure functions: no model, no file, no option.

A measure takes texts and gives a number or a truth: same_answer(text, expected) -> bool,
scores(text, label) -> {name: 0 to 100}. Rewards, training/predict.py and bench use the same ones.

answers.py     the final answer in a solution, and whether two are the same number or text
rouge_bleu.py  ROUGE-1, -2, -L, BLEU-4 and exact match, as LLaMA-Factory computes them

To add one: copy answers.py, name its source and its range in its first lines, add a line here.
"""
