"""What a run minimises: one file per value of `stage`.

The contract (stage.py): `weight(batch)` says how many things the loss is a sum over; `loss(model, batch)`
gives the fp32 sum () and metrics, name -> (sum, number); `evaluate`, `state`, `restore`. RolloutStage adds
what learning from texts of its own needs. The loop divides by the weights of all micro-batches and ranks.

    stage.py          Stage, RolloutStage           logprobs.py   hidden states -> log-probabilities, sums
    pt.py, sft.py     the next token                reference.py  the policy that others are held to
    rm.py             reward model, its scores      rewards.py    what an answer is worth
    dpo.py, orpo.py   pairs of answers              rollouts.py   prompts, and texts that the model writes
    kto.py            answers called good or bad    metrics.py    what is logged beside a loss
    ppo.py, grpo.py   reinforcement learning

A loss of pairs: a row, a name and a case in dpo.py.
To add one: copy the nearest file, add its class to STAGES below and its name to `stage` in
training/options.py; training/make_stage.py builds it from its options.
"""

from stages.dpo import PairPreference
from stages.grpo import GroupPolicy
from stages.kto import RatedPreference
from stages.orpo import OddsRatio
from stages.ppo import PPO
from stages.pt import DocumentLoss
from stages.rm import RewardModel
from stages.sft import TokenLoss
from stages.stage import RolloutStage, Stage

STAGES: dict[str, type[Stage]] = {"pt": DocumentLoss, "sft": TokenLoss, "rm": RewardModel}
STAGES |= {"dpo": PairPreference, "orpo": OddsRatio, "kto": RatedPreference, "ppo": PPO, "grpo": GroupPolicy}
WRITES = tuple(name for name, kind in STAGES.items() if issubclass(kind, RolloutStage))  # texts of their own
