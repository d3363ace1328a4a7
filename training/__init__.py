"""training: what train.py is made of. Nothing here knows the loop; train.py imports it all.

Before the loop
    options      TrainOptions (the run), OptimOptions (optimizer and learning rate)
    setup        read(config) -> Inputs, cheap; build(inputs) -> data, model, stage, state of a checkpoint
    weights      build_model: the weights that train, as shares where ranks share them
    make_stage   the stage with its reference and reward, from the options
    memory       what a step needs, and so how much is computed twice; plan: before any weight is read
    forecast     which of that a run asks for: plan=true, parallel=auto
In the loop
    optimizers/  the file of each value of `optim`: SERVES, make(model, groups, options) -> Optimizer
    schedules    schedule(step, options, total_steps) -> multiplier of the rate, pure; rounding: of bf16
    instruments  MetricWindow, Health, peak memory
    probe        test_oom: the largest batch before the first update
    measure      what an evaluation measures; predict: answers to its rows, and how close they come
What it leaves
    run          Run, what train.py's functions share: saved, restored, left; saving: beside the training
    run_folder   checkpoint-<step>, complete or absent; Progress, resuming; layout: on other ranks
    signals      what ends a run before its end; lost: which rank is gone
    monitor      log lines and files; plot: training_loss.png; trackers: tensorboard, wandb, mlflow

To add an optimizer: copy optimizers/sgd.py, name it in optimizers/__init__ and in OptimOptions.optim; a
schedule: a branch in schedules, its keys in options.SCHEDULE_KEYS; a tracker: a class and a line in trackers.
"""
