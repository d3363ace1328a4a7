"""Stage orpo: fine-tuning and preference at once, without a reference. arXiv 2403.07691 eq. 6-7.

    loss of a pair = -c - b log s(log odds(c) - log odds(r))        odds(p) = p / (1 - p)

c and r are mean log-probabilities of a token of the chosen and of the rejected answer, b is pref_beta, s the
sigmoid. `pref_loss: orpo` in stage dpo is the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.dpo import PairPreference


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid of the log odds ratio, (P,) -> (P,); c, r below 0, odds(c) = e^c / (1 - e^c)."""
    # an answer that is certain has infinite odds: held where fp32 can still tell 1 - e^c from 0
    c, r = chosen.clamp(max=-1e-7), rejected.clamp(max=-1e-7)
    # expm1: 1 - exp(c) rounds to 0 for a c near 0
    log_odds = (c - r) - (torch.log(-torch.expm1(c)) - torch.log(-torch.expm1(r)))
    return -F.logsigmoid(log_odds)


class OddsRatio(PairPreference):
    evaluation_names = (*PairPreference.evaluation_names, "odds_ratio_loss")

    def losses(self, ratios: Tensor) -> Tensor:
        """Without -c, which is the chosen answer's own loss (PreferenceOptions.chosen_weight)."""
        return self.options.pref_beta * odds_ratio_loss(*ratios)

    def own_metrics(self, preference: Tensor) -> dict[str, Tensor]:
        return {"odds_ratio_loss": preference / self.options.pref_beta}
