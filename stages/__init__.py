"""What a run minimises: one file per value of `stage`.

The contract (stage.py): `weight(batch)` says how many things the loss is a sum over; `loss(model, batch)` gives the
fp32 sum, () and metrics, name -> (sum, number); `evaluate`, `state` and `restore`. RolloutStage adds what learning
from the model's own texts needs. The loop (train.py) divides by the weights of all micro-batches and ranks.

    stage.py      Stage, RolloutStage          logprobs.py   hidden states -> log-probabilities of labels, their sums
    pt.py sft.py  next tokens                  reference.py  the policy that dpo, kto, ppo and grpo are held to
    rm.py         reward model, scores         rewards.py    what an answer is worth: functions, a model, a server
    dpo.py orpo.py   pairs of answers          rollouts.py   prompts, and texts that the model writes to them
    kto.py        answers called good or bad
    ppo.py grpo.py   reinforcement learning

To add one: copy the nearest file, add its class to STAGES below and its name to `stage` in training/options.py, the
options that it alone reads to its own dataclass, and where it is built to training/make_stage.py.
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

STAGES: dict[str, type[Stage]] = {
    "pt": DocumentLoss,
    "sft": TokenLoss,
    "rm": RewardModel,
    "dpo": PairPreference,
    "orpo": OddsRatio,
    "kto": RatedPreference,
    "ppo": PPO,
    "grpo": GroupPolicy,
}
WRITES = tuple(
    name for name, kind in STAGES.items() if issubclass(kind, RolloutStage)
)  # learn from their own texts
